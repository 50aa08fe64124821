"""`search-r3`: one subcommand a stage; thin."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import tyro

from search_r3_jax.config import RunConfig, TextConfig
from search_r3_jax.configs import load_config
from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.settings import EvalSettings
from search_r3_jax.quiet import quiet

INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """The whole method, small, with nothing but installed packages.

    Attributes:
        out: folder for data, runs, the exported model and summary.json; a second call goes on from what is there.
        debug: show the traceback of an error.
    """

    out: Path = Path("runs/quickstart")
    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.configs.quickstart import config
        from search_r3_jax.quickstart import Quickstart as Work

        Work(self.out, config).run()


@dataclass(frozen=True, kw_only=True)
class Sft:
    """Stage 1: contrastive fine-tuning. Calling it again with the same --run goes on from the last checkpoint.

    Attributes:
        config: an experiment; the settings below show its values and change them.
        run_folder: folder of the run; made where it is missing.
        debug: show the traceback of an error.
    """

    config: str
    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    settings: Annotated[RunConfig, tyro.conf.arg(name="")]
    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.console import Stages
        from search_r3_jax.data.development import load_training_sets
        from search_r3_jax.hub.checkpoint import load_model, with_lora
        from search_r3_jax.training.sft import train_sft

        config, console = self.settings, Stages(1)
        sets = load_training_sets(config.data)
        for each in sets:
            dev = f"; {len(each.dev.queries)} of {each.dev.split} over {len(each.dev.documents)} to watch" if each.dev else ""
            console.say(f"{each.train.name}: {len(each.train.queries)} queries of {each.train.split}{dev}")
        console.say(f"loading {config.model}")
        model = load_model(config.model, compute_dtype=config.compute_dtype, remat=config.remat, attention=config.attention)
        with console.bar("steps", config.sft.steps) as bar:

            def on_step(done: int, total: int, values: dict[str, float]) -> None:
                rate = f"{values['tokens_per_second']:,.0f} tokens/s, MFU {values['mfu']:.0%}"
                bar.to(done, f"loss {values['loss']:.3f}, in-batch accuracy {values['in_batch_accuracy']:.0%}, {rate}", total)

            train_sft(config, self.run_folder, sets, with_lora(model, config.lora, seed=config.seed), on_step, say=console.say)
        console.say(f"{self.run_folder}: done; search-r3 export --run {self.run_folder} --out FOLDER writes the model")


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """Follow a run of stage 2: encode its corpus with each new snapshot and publish an index version.

    Attributes:
        run_folder: directory of the run.
        parent: process that started this one; the indexer ends with it.
        debug: show the traceback of an error.
    """

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    parent: int | None = None
    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.retrieval.indexer import run_indexer

        run_indexer(self.run_folder, parent=self.parent)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run or a model as a Hugging Face folder, for sentence-transformers too; or a run's adapters for PEFT.

    Attributes:
        out: folder to write; must not exist, or be an earlier export.
        model: a run directory, a Hugging Face folder, a GGUF file, or `smollm2`.
        run_folder: a run directory.
        step: checkpoint of a run, a number or `best` (on its development queries); the newest by default.
        dtype: of the weights.
        peft: write the adapters of a run instead of merged weights.
        base: with --peft: name or folder of the checkpoint the adapters belong to; the folder that the run started from by default.
        debug: show the traceback of an error.
    """

    out: Path
    model: str | None = None
    run_folder: Annotated[Path | None, tyro.conf.arg(name="run")] = None
    step: int | Literal["best"] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    peft: bool = False
    base: str | None = None
    debug: bool = False

    def run(self) -> None:
        source = self._source()
        if self.peft:
            print(self._export_adapters(Path(source)))
            return
        if self.base is not None:
            raise UserError("--base: names the checkpoint of adapters; give --peft with it, or leave it out")
        from search_r3_jax.hub.checkpoint import load_model
        from search_r3_jax.hub.export import export_model

        print(export_model(load_model(source, step=self.step), self.out, dtype=self.dtype))

    def _source(self) -> str:
        if (self.model is None) == (self.run_folder is None):
            raise UserError("--model, --run: give one of them")
        if self.run_folder is not None and not (self.run_folder / "checkpoints").is_dir():
            raise UserError(f"--run: {self.run_folder}: has no checkpoints; give the folder that sft or rl wrote to")
        return self.model or str(self.run_folder)

    def _export_adapters(self, run: Path) -> Path:
        from search_r3_jax.hub.peft import export_peft, load_stages

        if not (run / "checkpoints").is_dir():
            raise UserError(f"--peft: {run}: is no run, so it has no adapters; give a run directory")
        stages, start = load_stages(run, step=self.step)
        base = self.base or start
        if self.base is None and not Path(start).is_dir():
            raise UserError(f"--base: the run starts from {start!r}, which PEFT cannot open; name the Hugging Face checkpoint it came from")
        return export_peft(stages[-1], self.out, base=base, earlier=stages[:-1])


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Embed the texts of a file, one a line, into a NumPy array.

    Attributes:
        model: a run directory, a Hugging Face folder, a GGUF file, or `smollm2`.
        input: one text a line; a name that ends in .jsonl holds one object with a `text` a line.
        out: array [texts, dimension] of float32 unit vectors, in .npy format.
        mode: `reason` lets the model think before it embeds; queries only.
        kind: what the texts are; documents are embedded directly.
        truncate_dim: keep so many dimensions, normalised again.
        max_tokens: tokens of a text that are read.
        step: checkpoint of a run, a number or `best` (on its development queries); the newest by default.
        debug: show the traceback of an error.
    """

    model: str
    input: Path
    out: Path
    mode: Literal["direct", "reason"] = "direct"
    kind: Literal["query", "document"] = "query"
    truncate_dim: int | None = None
    max_tokens: int | None = None
    step: int | Literal["best"] | None = None
    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.files import read_texts

        texts = read_texts(self.input)
        if not self.out.parent.is_dir():
            raise UserError(f"--out: {self.out.parent}: no such folder; make it first")
        from search_r3_jax.embedder import Embedder
        from search_r3_jax.files import write_array

        embedder = Embedder.load(self.model, step=self.step, max_tokens=self.max_tokens)
        started = time.perf_counter()
        vectors = embedder.encode(texts, kind=self.kind, mode=self.mode, truncate_dim=self.truncate_dim, progress=True)
        seconds = time.perf_counter() - started
        write_array(self.out, vectors)
        count, dimension = vectors.shape
        print(f"{self.out}: {count} {self.kind} vectors of {dimension} dimensions, {self.mode}, in {seconds:.1f} s")


@dataclass(frozen=True, kw_only=True)
class Eval(EvalSettings):
    """Measure a model or a baseline on a data set: nDCG@10, recall, MRR, MAP and what it costs.

    Attributes:
        debug: show the traceback of an error.
    """

    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.evaluation.report import run_evaluation

        run_evaluation(self)


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Whether the second of two results of `eval` is better than the first by more than chance, and on which queries.

    Attributes:
        first: a file of `eval --out`; where it holds both modes, append :direct or :reason.
        second: another of the same data, split and cut, or another mode of the same file.
        metric: ndcg@10, recall@10, recall@100, mrr or map.
        samples: of the bootstrap and of the permutation test.
        seed: of both.
        debug: show the traceback of an error.
    """

    first: tyro.conf.Positional[str]
    second: tyro.conf.Positional[str]
    metric: str = "ndcg@10"
    samples: int = 10_000
    seed: int = 0
    debug: bool = False

    def run(self) -> None:
        from rich.console import Console

        from search_r3_jax.evaluation.compare import compare_results, read_result, show_comparison

        first, second = read_result(self.first), read_result(self.second)
        comparison = compare_results(first, second, self.metric, samples=self.samples, seed=self.seed)
        show_comparison(first, second, comparison, Console(highlight=False))


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well a model writes plain text: perplexity of documents, to hold a trained model against the one it started from.

    Attributes:
        model: a run directory, a Hugging Face folder, a GGUF file, or `smollm2`.
        data: a built data set or a BEIR folder.
        split: whose corpus is read.
        max_documents: so many random documents.
        max_tokens: tokens of a document that are read.
        step: checkpoint of a run; the newest by default.
        seed: draws the documents.
        out: JSON file for the numbers.
        debug: show the traceback of an error.
    """

    model: str
    data: Path
    split: str = "test"
    max_documents: int = 500
    max_tokens: int = 256
    step: int | None = None
    seed: int = 0
    out: Path | None = None
    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.evaluation.perplexity import measure_perplexity

        found = measure_perplexity(
            self.model,
            self.data,
            split=self.split,
            max_documents=self.max_documents,
            max_tokens=self.max_tokens,
            step=self.step,
            seed=self.seed,
            out=self.out,
        )
        print(f"{self.model}: perplexity {found['perplexity']:.4f} of {found['tokens']} tokens in {found['texts']} documents")


@dataclass(frozen=True, kw_only=True)
class DataBuild:
    """Build a TFDS data set (array_record) from a BEIR folder, a .jsonl file or installed Python packages.

    Attributes:
        source: `beir` reads a folder, `jsonl` a file with a query and its documents a line, `python-functions` Python packages.
        out: folder to write; must not exist, or hold the same data set.
        input: what the source reads; `python-functions` takes the installed packages by default.
        split: the splits to build; all that are there by default.
        skip_bad: leave bad lines out, name the first 20 and count them; otherwise the first one ends the build.
        seed: with python-functions: draws the packages and functions.
        train_functions: with python-functions: size of the split.
        dev_functions: with python-functions: size of the split.
        test_functions: with python-functions: size of the split.
        debug: show the traceback of an error.
    """

    source: Literal["beir", "jsonl", "python-functions"]
    out: Path
    input: Path | None = None
    split: tuple[str, ...] = ()
    skip_bad: bool = False
    seed: int = 0
    train_functions: int = 384
    dev_functions: int = 50
    test_functions: int = 600
    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.data.build import FunctionCounts, build_beir, build_jsonl, build_python_functions

        if self.source == "python-functions":
            counts = FunctionCounts(
                seed=self.seed,
                train_functions=self.train_functions,
                dev_functions=self.dev_functions,
                test_functions=self.test_functions,
            )
            collections = build_python_functions(self.input, self.out, counts=counts, splits=self.split)
        elif self.input is None:
            raise UserError(f"--input: missing; --source {self.source} reads it")
        elif self.source == "beir":
            collections = build_beir(self.input, self.out, splits=self.split, skip_bad=self.skip_bad)
        else:
            collections = build_jsonl(self.input, self.out, splits=self.split, skip_bad=self.skip_bad)
        for split, collection in collections.items():
            print(f"{self.out}: {split}: {len(collection.queries)} queries over {len(collection.documents)} documents")


@dataclass(frozen=True, kw_only=True)
class DataMine:
    """Add hard negatives to the queries of a split: the nearest documents that are not known to be relevant; a new data set.

    Attributes:
        model: a run directory, a Hugging Face folder, a GGUF file, or `smollm2`.
        data: a built data set or a BEIR folder.
        out: folder to write; must not exist.
        split: whose queries get negatives; the others are carried over.
        num_negatives: at most so many for each query, behind those it has.
        first_rank: first rank to choose from; 0 is the most similar document that is not judged.
        last_rank: first rank not to choose from; by default so that num-negatives fit, ten times as many with a limit or random sampling.
        margin: least distance below the cosine of the query's weakest positive.
        relative_margin: the same, as a share of that cosine.
        max_score: highest cosine.
        sampling: `top` takes the most similar ones of those left, `random` any.
        seed: of random sampling.
        index: how documents are searched; `auto` is ScaNN where it is installed.
        max_query_tokens: tokens of a query that are read.
        max_document_tokens: tokens of a document that are read.
        step: checkpoint of a run; the newest by default.
        debug: show the traceback of an error.
    """

    model: str
    data: Path
    out: Path
    split: str = "train"
    num_negatives: int = 4
    first_rank: int = 0
    last_rank: int | None = None
    margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    sampling: Literal["top", "random"] = "top"
    seed: int = 0
    index: Literal["auto", "exact", "scann"] = "auto"
    max_query_tokens: int = TextConfig().max_query_tokens
    max_document_tokens: int = TextConfig().max_document_tokens
    step: int | None = None
    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.retrieval.mined_dataset import mine_dataset
        from search_r3_jax.retrieval.mining import MiningOptions

        options = MiningOptions(
            num_negatives=self.num_negatives,
            first_rank=self.first_rank,
            last_rank=self.last_rank,
            max_score=self.max_score,
            margin=self.margin,
            relative_margin=self.relative_margin,
            sampling=self.sampling,
            seed=self.seed,
        )
        counts = mine_dataset(
            self.model,
            self.data,
            self.out,
            split=self.split,
            options=options,
            index=self.index,
            max_query_tokens=self.max_query_tokens,
            max_document_tokens=self.max_document_tokens,
            step=self.step,
        )
        print(f"{counts.queries} queries of split {self.split}, {counts.documents} different documents")
        print(f"{counts.mined} negatives mined; {counts.short} queries have fewer than {self.num_negatives}")
        print(f"left out: {counts.positives} known to be relevant, {counts.judged} negatives already, {counts.too_close} within a limit")
        print(f"written to {self.out}")


DataCommand = Annotated[DataBuild, tyro.conf.subcommand("build")] | Annotated[DataMine, tyro.conf.subcommand("mine")]

Command = (
    Annotated[Quickstart, tyro.conf.subcommand("quickstart")]
    | Annotated[Indexer, tyro.conf.subcommand("indexer")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Embed, tyro.conf.subcommand("embed")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Perplexity, tyro.conf.subcommand("perplexity")]
    | Annotated[DataCommand, tyro.conf.subcommand("data", description="Build data sets, and mine hard negatives.")]
)


def main() -> None:
    """Parse the command line and run one subcommand; exit status 2 for a user's mistake, 130 when interrupted."""
    quiet()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        command = tyro.cli(_commands(sys.argv[1:]), prog="search-r3", config=(tyro.conf.OmitSubcommandPrefixes,))
        command.run()
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        print(f"search-r3: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("search-r3: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.stderr.flush()
        # Threads of the libraries beneath may still be busy; nothing of ours is unwritten.
        os._exit(INTERRUPTED)


def _commands(arguments: Sequence[str]) -> Any:
    """The subcommands; settings of a stage of training begin with the values of the experiment that --config names."""
    name = _value_of("--config", arguments)
    required = tyro.MISSING
    sft = Sft(config=name or required, run_folder=required, settings=load_config(name) if name else RunConfig())
    return Command | Annotated[Sft, tyro.conf.subcommand("sft", default=sft)]


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    for argument, following in itertools.pairwise([*arguments, ""]):
        if argument.startswith(f"{option}="):
            return argument.removeprefix(f"{option}=")
        if argument == option and following:
            return following
    return None


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
