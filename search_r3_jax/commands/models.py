"""Commands that use a model: export, embed, think."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from search_r3_jax.commands.options import Common, CommonOptions
from search_r3_jax.config import InferenceConfig, Step
from search_r3_jax.console import print_line
from search_r3_jax.errors import EmbeddingError, UserError

if TYPE_CHECKING:
    import numpy as np

    from search_r3_jax.commands.vector_files import Texts
    from search_r3_jax.embedder import Embedder, Thought
    from search_r3_jax.hub.load_model import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run or a model as a Hugging Face folder, also for sentence-transformers.

    `--peft` writes a run's adapters for PEFT instead.

    Attributes:
        out: Folder to write. Must not exist, or be an earlier export.
        model: Model to export: run folder, Hugging Face folder or id, GGUF file, or `smollm2`
            (SmolLM2-135M-Instruct, as installed). Give this or `--run`.
        run_folder: Run to export. Give this or `--model`.
        step: Checkpoint of a run: a step or `best` (on its development queries). None: the newest.
        dtype: Precision of the written weights.
        peft: Write the run's adapters for PEFT instead of merged weights.
        base: With `--peft`: name or folder of the checkpoint that the adapters belong to. None: the folder
            that the run started from.
        common: Options of every command.
    """

    out: Path
    model: str | None = None
    run_folder: Annotated[Path | None, tyro.conf.arg(name="run")] = None
    step: Step = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    peft: bool = False
    base: str | None = None
    common: Common = field(default_factory=CommonOptions)

    def run(self) -> None:
        """Run the subcommand."""
        source = self._source()
        if self.peft:
            print_line(str(self._export_adapters(Path(source))))
            return
        if self.base is not None:
            raise UserError("--base: names the checkpoint of adapters; give --peft with it, or leave it out")
        from search_r3_jax.evaluation.card_facts import card_facts
        from search_r3_jax.hub.export import EXPORT_MANIFEST, export_model
        from search_r3_jax.hub.folders import check_replaceable
        from search_r3_jax.hub.load_model import load_model, pinned_step

        check_replaceable(self.out, marker=EXPORT_MANIFEST)
        # Chosen once: a run that is still training saves others meanwhile.
        step = pinned_step(source, self.step)
        model = load_model(source, step=step)
        # Finite weights may overflow, and an exported model no longer says so.
        _require_embeddings(model, source)
        facts = card_facts(source, step, model)
        print_line(str(export_model(model, self.out, dtype=self.dtype, facts=facts)))

    def _source(self) -> str:
        if (self.model is None) == (self.run_folder is None):
            raise UserError("--model, --run: give one of them")
        if self.run_folder is not None and not (self.run_folder / "checkpoints").is_dir():
            raise UserError(
                f"--run: {self.run_folder}: has no checkpoints; give the folder that sft or rl wrote to"
            )
        return self.model or str(self.run_folder)

    def _export_adapters(self, run: Path) -> Path:
        from search_r3_jax.evaluation.card_facts import card_facts
        from search_r3_jax.hub.base_model import renamed_base
        from search_r3_jax.hub.checkpoint_reader import resolve_step
        from search_r3_jax.hub.export import EXPORT_MANIFEST
        from search_r3_jax.hub.folders import check_replaceable
        from search_r3_jax.hub.peft import export_peft, load_stages

        check_replaceable(self.out, marker=EXPORT_MANIFEST)
        if not (run / "checkpoints").is_dir():
            raise UserError(f"--peft: {run}: is no run, so it has no adapters; give a run directory")
        step = resolve_step(run, self.step)
        stages, start = load_stages(run, step=step)
        base = self.base or start
        if self.base is None and not Path(start).is_dir():
            raise UserError(
                f"--base: the run starts from {start!r}, which PEFT cannot open; name the Hugging Face "
                "checkpoint it came from"
            )
        facts = card_facts(str(run), step, stages[-1])
        if self.base is not None:
            facts = dataclasses.replace(facts, base=renamed_base(facts.base, self.base))
        return export_peft(stages[-1], self.out, base=base, earlier=stages[:-1], facts=facts)


@dataclass(frozen=True, kw_only=True)
class Embed(InferenceConfig):
    """Embed texts: write their vectors, with their ids.

    Attributes:
        model: Run folder, Hugging Face folder or id, GGUF file, or `smollm2` (SmolLM2-135M-Instruct, as
            installed).
        input: What to embed: a text file, one text per line; a .jsonl file, objects with `text`,
            perhaps `title` and `_id`; a BEIR folder or a built data set, its queries or with `--kind
            document` its corpus; `-`, lines of standard input. Files may be gzipped (.gz).
        out: File to write: .npy, vectors [texts, dimension]; .npz, `ids` and `vectors`; .parquet,
            columns `id` and `vector`; .jsonl, objects with `id` and `vector`. Any other name: .npy format.
        mode: `reason`: the model thinks before it embeds (queries only). `direct`: it does not.
        kind: What the texts are. Documents are embedded directly.
        split: Of a BEIR folder or a built data set: the split to read. None: all that is there.
        truncate_dim: Keep this many dimensions and normalise again. None: all.
        precision: float32; int8 or uint8, 256 steps between the least and the greatest value of each
            dimension over these texts; binary or ubinary, the signs, eight to a byte.
        max_tokens: Longest text, in tokens. None: what an exported folder says, else 512.
        max_think_tokens: Longest thought, in tokens. None: 32.
        thoughts: File to write what the model thought of each query to, as .jsonl. None: none.
        vectors: Folder that keeps the vectors as they are made, in mode direct: for more than memory holds,
            and to go on after an interruption. None: in memory.
        step: Checkpoint of a run: a step or `best` (on its development queries). None: the newest.
        profile_steps: Passes to trace for xprof, as FIRST:END, counted from 0; 3:6 is 3, 4 and 5. A batch of
            queries that think is one. None: none.
        profile_folder: Folder for that trace.
        common: Options of every command.
    """

    model: str
    input: Path
    out: Path
    mode: Literal["direct", "reason"] = "direct"
    kind: Literal["query", "document"] = "query"
    split: str | None = None
    truncate_dim: int | None = None
    precision: Literal["float32", "int8", "uint8", "binary", "ubinary"] = "float32"
    max_tokens: int | None = None
    max_think_tokens: int | None = None
    thoughts: Path | None = None
    vectors: Path | None = None
    step: Step = None
    profile_steps: str | None = None
    profile_folder: Path = Path("profile")
    common: Common = field(default_factory=CommonOptions)

    def run(self) -> None:
        """Run the subcommand."""
        from search_r3_jax.commands.vector_files import read_texts, writer_of
        from search_r3_jax.hub.model_names import check_model_name
        from search_r3_jax.outputs import (
            check_output,
            check_output_folder,
            check_outputs,
            message_stream,
            write_all,
            write_result,
        )
        from search_r3_jax.profiling import ENCODE, trace_steps
        from search_r3_jax.rollout.encoding_rate import rate_text

        self._check()
        check_outputs(("--out", self.out), ("--thoughts", self.thoughts), inputs=[self.input, self.model])
        check_model_name(self.model)
        listed = read_texts(self.input, self.kind, self.split)
        steps = self._profiled_passes(len(listed.texts))
        write = writer_of(self.out, listed.ids)
        if self.precision in ("int8", "uint8") and len(listed.texts) == 1:
            raise UserError(f"--precision: {self.precision}: one text has no range; give more, or float32")
        embedder = _embedder(self)
        size = 4 * len(listed.texts) * (self.truncate_dim or embedder.dimension)
        check_output("--out", self.out, size=size)
        # In shards, and joined.
        check_output_folder("--vectors", self.vectors, size=8 * len(listed.texts) * embedder.dimension)
        say = partial(print_line, stream=message_stream(self.out))
        started = time.perf_counter()
        with trace_steps(ENCODE, steps, self.profile_folder, say=say):
            vectors, thoughts = self._vectors(embedder, listed)
        seconds = time.perf_counter() - started
        write_all(
            lambda: self._write_thoughts(listed, thoughts),
            lambda: write_result("--out", self.out, lambda file: write(file, vectors)),
        )
        rate = rate_text(embedder.encoding_rate())
        say(
            f"{self.out}: {len(listed.texts)} {self.kind} vectors of "
            f"{self.truncate_dim or embedder.dimension} dimensions, {self.mode}, in {seconds:.1f} s"
            + (f" ({rate})" if rate else "")
        )

    def _vectors(self, embedder: Embedder, listed: Texts) -> tuple[np.ndarray, Sequence[Thought]]:
        """The vectors [N,E] of the texts, and what was thought, in mode reason."""
        if self.vectors is not None:
            from search_r3_jax.commands.vector_files import kept_vectors

            kept = kept_vectors(embedder, listed, self.kind, self.vectors, self.compute_dtype)
            vectors = embedder.finished(
                kept, listed.texts, truncate_dim=self.truncate_dim, precision=self.precision
            )
            return vectors, ()
        if self.mode == "direct":
            vectors = embedder.encode(
                listed.texts,
                kind=self.kind,
                truncate_dim=self.truncate_dim,
                precision=self.precision,
                progress=True,
            )
            return vectors, ()
        thoughts = embedder.think(listed.texts, progress=True)
        vectors = embedder.vectors_of(
            thoughts, listed.texts, truncate_dim=self.truncate_dim, precision=self.precision
        )
        return vectors, thoughts

    def _write_thoughts(self, listed: Texts, thoughts: Sequence[Thought]) -> None:
        if self.thoughts is None:
            return
        from search_r3_jax.files import write_json_lines
        from search_r3_jax.outputs import write_result

        records = [
            {"id": name, "text": text, "thought": each.text, "valid": each.valid, "tokens": each.tokens}
            for name, text, each in zip(listed.ids, listed.texts, thoughts, strict=True)
        ]
        write_result("--thoughts", self.thoughts, lambda file: write_json_lines(file, records))

    def _profiled_passes(self, texts: int) -> range | None:
        """The passes to trace; raises UserError for a mistake in the options, or where there are fewer."""
        from search_r3_jax.outputs import check_output_folder
        from search_r3_jax.profiling import parse_steps

        steps = parse_steps(self.profile_steps)
        if steps is None:
            return None
        check_output_folder("--profile-folder", self.profile_folder)
        # Each pass holds a text at least.
        if steps.start >= texts:
            raise UserError(
                f"--profile-steps: {self.profile_steps}: {texts} texts take {texts} passes at most; begin "
                "earlier"
            )
        return steps

    def _check(self) -> None:
        """Raise UserError for a mistake in the options, before anything is read."""
        _check_limits(self)
        if self.truncate_dim is not None and self.truncate_dim < 1:
            raise UserError(f"--truncate-dim: {self.truncate_dim}: give 1 or more, or leave it out")
        if self.kind == "document" and self.mode == "reason":
            raise UserError("--mode: reason: documents are embedded directly; give direct, or --kind query")
        for flag, value in (("--thoughts", self.thoughts), ("--max-think-tokens", self.max_think_tokens)):
            if self.mode == "direct" and value is not None:
                raise UserError(f"{flag}: nothing is thought in mode direct; give --mode reason")
        if self.mode == "reason" and self.vectors is not None:
            raise UserError("--vectors: keeps vectors of mode direct only; leave it out")


@dataclass(frozen=True, kw_only=True)
class Think(InferenceConfig):
    """Show what a model thinks of queries before it embeds them.

    Attributes:
        model: Run folder, Hugging Face folder or id, GGUF file, or `smollm2` (SmolLM2-135M-Instruct, as
            installed).
        queries: One or more queries, each in quotation marks.
        max_tokens: Longest query, in tokens. None: the model's limit.
        max_think_tokens: Longest thought, in tokens. None: 32.
        step: Checkpoint of a run: a step or `best` (on its development queries). None: the newest.
        common: Options of every command.
    """

    model: str
    queries: tyro.conf.Positional[tuple[str, ...]]
    max_tokens: int | None = None
    max_think_tokens: int | None = None
    step: Step = None
    common: Common = field(default_factory=CommonOptions)

    def run(self) -> None:
        """Run the subcommand."""
        _check_limits(self)
        if not self.queries:
            raise UserError("queries: none; give some behind the options")
        from search_r3_jax.console import TextConsole

        embedder, console = _embedder(self), TextConsole()
        for query, thought in zip(self.queries, embedder.think(self.queries), strict=True):
            how = "embeds by itself" if thought.valid else "was made to embed"
            console.print(f"{query}  ({thought.tokens} tokens, {how})", style="bold", markup=False)
            for line in thought.text.splitlines() or ["(no words)"]:
                console.print(f"  {line}", markup=False)


def _check_limits(options: Embed | Think) -> None:
    if options.max_tokens is not None and options.max_tokens < 1:
        raise UserError(f"--max-tokens: {options.max_tokens}: give 1 or more, or leave it out")
    if options.max_think_tokens is not None and options.max_think_tokens < 0:
        raise UserError(f"--max-think-tokens: {options.max_think_tokens}: give 0 or more, or leave it out")


def _embedder(options: Embed | Think) -> Embedder:
    from search_r3_jax.embedder import MAX_THINK_TOKENS, Embedder
    from search_r3_jax.mesh import mesh_from_config

    budget = MAX_THINK_TOKENS if options.max_think_tokens is None else options.max_think_tokens
    return Embedder.load(
        options.model,
        step=options.step,
        max_tokens=options.max_tokens,
        max_think_tokens=budget,
        compute_dtype=options.compute_dtype,
        param_dtype=options.param_dtype,
        mesh=mesh_from_config(options.mesh),
    )


def _require_embeddings(model: LoadedModel, name: str) -> None:
    """Raise UserError where the model gives a text no vector that is finite and not zero."""
    from flax import nnx

    from search_r3_jax.rollout.encoder import Encoder

    graph, state = nnx.split(model.decoder)
    try:
        Encoder(graph, model.prompter(), mesh=model.mesh).encode(state, ["a"], max_tokens=8)
    except EmbeddingError as error:
        raise UserError(f"{name}: makes no embeddings ({error}); choose another model") from None
