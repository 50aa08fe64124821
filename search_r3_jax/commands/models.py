"""Commands that use a model: export, embed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from search_r3_jax.commands.options import Common, CommonOptions
from search_r3_jax.config import Step
from search_r3_jax.console import print_line
from search_r3_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run or a model as a Hugging Face folder, also for sentence-transformers.

    `--peft` writes a run's adapters for PEFT instead.

    Attributes:
        out: Folder to write. Must not exist, or be an earlier export.
        model: Model to export: run folder, Hugging Face folder, GGUF file, or `smollm2`. Give this or
            `--run`.
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
        from search_r3_jax.hub.export import EXPORT_MANIFEST, export_model
        from search_r3_jax.hub.folders import check_replaceable
        from search_r3_jax.hub.load_model import load_model

        check_replaceable(self.out, marker=EXPORT_MANIFEST)
        print_line(str(export_model(load_model(source, step=self.step), self.out, dtype=self.dtype)))

    def _source(self) -> str:
        if (self.model is None) == (self.run_folder is None):
            raise UserError("--model, --run: give one of them")
        if self.run_folder is not None and not (self.run_folder / "checkpoints").is_dir():
            raise UserError(
                f"--run: {self.run_folder}: has no checkpoints; give the folder that sft or rl wrote to"
            )
        return self.model or str(self.run_folder)

    def _export_adapters(self, run: Path) -> Path:
        from search_r3_jax.hub.export import EXPORT_MANIFEST
        from search_r3_jax.hub.folders import check_replaceable
        from search_r3_jax.hub.peft import export_peft, load_stages

        check_replaceable(self.out, marker=EXPORT_MANIFEST)
        if not (run / "checkpoints").is_dir():
            raise UserError(f"--peft: {run}: is no run, so it has no adapters; give a run directory")
        stages, start = load_stages(run, step=self.step)
        base = self.base or start
        if self.base is None and not Path(start).is_dir():
            raise UserError(
                f"--base: the run starts from {start!r}, which PEFT cannot open; name the Hugging Face "
                "checkpoint it came from"
            )
        return export_peft(stages[-1], self.out, base=base, earlier=stages[:-1])


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Embed the texts of a file, one per line, into a NumPy array.

    Attributes:
        model: Run folder, Hugging Face folder, GGUF file, or `smollm2`.
        input: Text file, one text per line; or a .jsonl file, one object with a `text` per line. Either may
            be gzipped (.gz).
        out: File to write: float32 unit vectors [texts, dimension] in .npy format.
        mode: `reason`: the model thinks before it embeds (queries only). `direct`: it does not.
        kind: What the texts are. Documents are embedded directly.
        truncate_dim: Keep this many dimensions and normalise again. None: all.
        max_tokens: Longest text, in tokens. None: the model's limit.
        step: Checkpoint of a run: a step or `best` (on its development queries). None: the newest.
        common: Options of every command.
    """

    model: str
    input: Path
    out: Path
    mode: Literal["direct", "reason"] = "direct"
    kind: Literal["query", "document"] = "query"
    truncate_dim: int | None = None
    max_tokens: int | None = None
    step: Step = None
    common: Common = field(default_factory=CommonOptions)

    def run(self) -> None:
        """Run the subcommand."""
        from search_r3_jax.files import save_array
        from search_r3_jax.lines import read_texts
        from search_r3_jax.outputs import check_output, message_stream, write_result

        for flag, value in (("--max-tokens", self.max_tokens), ("--truncate-dim", self.truncate_dim)):
            if value is not None and value < 1:
                raise UserError(f"{flag}: {value}: give 1 or more, or leave it out")
        if self.kind == "document" and self.mode == "reason":
            raise UserError("--mode: reason: documents are embedded directly; give direct, or --kind query")
        check_output("--out", self.out)
        texts = read_texts(self.input)
        from search_r3_jax.embedder import Embedder

        embedder = Embedder.load(self.model, step=self.step, max_tokens=self.max_tokens)
        check_output("--out", self.out, size=4 * len(texts) * (self.truncate_dim or embedder.dimension))
        started = time.perf_counter()
        vectors = embedder.encode(
            texts, kind=self.kind, mode=self.mode, truncate_dim=self.truncate_dim, progress=True
        )
        seconds = time.perf_counter() - started
        write_result("--out", self.out, lambda file: save_array(file, vectors))
        count, dimension = vectors.shape
        print_line(
            f"{self.out}: {count} {self.kind} vectors of {dimension} dimensions, {self.mode}, in "
            f"{seconds:.1f} s",
            message_stream(self.out),
        )
