"""Commands that evaluate."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from search_r3_jax.commands.options import Common, CommonOptions
from search_r3_jax.config import InferenceConfig, Step
from search_r3_jax.console import print_line
from search_r3_jax.distributed.spec import Cluster
from search_r3_jax.evaluation.settings import BudgetSettings, EvalSettings, MtebSettings
from search_r3_jax.extras import require


@dataclass(frozen=True, kw_only=True)
class Eval(EvalSettings):
    """Measure a model or a baseline on a data set: nDCG@10, recall, MRR, MAP and what it costs.

    Attributes:
        cluster: Processes that share the model.
        common: Options of every command.
    """

    cluster: Cluster = field(default_factory=Cluster)
    common: Common = field(default_factory=CommonOptions)

    def run(self) -> None:
        """Run the subcommand."""
        from search_r3_jax.distributed.runtime import join_cluster
        from search_r3_jax.evaluation.report import run_evaluation

        with join_cluster(self.cluster):
            run_evaluation(self)


@dataclass(frozen=True, kw_only=True)
class Budget(BudgetSettings):
    """Measure what thinking gains and costs: budgets of thinking tokens, and direct search.

    Attributes:
        cluster: Processes that share the model.
        common: Options of every command.
    """

    cluster: Cluster = field(default_factory=Cluster)
    common: Common = field(default_factory=CommonOptions)

    def run(self) -> None:
        """Run the subcommand."""
        from search_r3_jax.distributed.runtime import join_cluster
        from search_r3_jax.evaluation.budget import run_budget

        with join_cluster(self.cluster):
            run_budget(self)


@dataclass(frozen=True, kw_only=True)
class Mteb(MtebSettings):
    """Measure a model with MTEB: on MTEB's tasks, or on data sets of yours.

    Attributes:
        common: Options of every command.
    """

    common: Common = field(default_factory=CommonOptions)

    def run(self) -> None:
        """Run the subcommand."""
        require("mteb", "mteb", "mteb", "torch", "sentence_transformers")
        from search_r3_jax.evaluation.mteb_run import run_mteb

        run_mteb(self)


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Test whether the second of two results of `eval` is better than the first, and on which queries.

    Attributes:
        first: File of `eval --out`. Where it holds several modes, append :direct, :reason or :average.
        second: Another file on the same data, or another mode of the same file.
        metric: Metric to compare: ndcg@10, recall@10, recall@100, mrr or map.
        samples: Samples of the bootstrap and of the permutation test.
        seed: Seed of the bootstrap and of the permutation test.
        common: Options of every command.
    """

    first: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FIRST")]
    second: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SECOND")]
    metric: str = "ndcg@10"
    samples: int = 10_000
    seed: int = 0
    common: Common = field(default_factory=CommonOptions)

    def run(self) -> None:
        """Run the subcommand."""
        from search_r3_jax.console import TextConsole
        from search_r3_jax.evaluation.compare import compare_results, read_result, show_comparison

        first, second = read_result(self.first), read_result(self.second)
        comparison = compare_results(first, second, self.metric, samples=self.samples, seed=self.seed)
        show_comparison(first, second, comparison, TextConsole(soft_wrap=False))


@dataclass(frozen=True, kw_only=True)
class Perplexity(InferenceConfig):
    """Measure how well a model writes plain text: the perplexity of documents.

    Attributes:
        model: Run folder, Hugging Face folder or id, GGUF file, or `smollm2` (SmolLM2-135M-Instruct, as
            installed).
        data: Built data set or BEIR folder.
        split: A split of the data set, whose corpus is read.
        max_documents: Random documents to read.
        max_tokens: Tokens to read of a document.
        step: Checkpoint of a run: a step or `best` (on its development queries). None: the newest.
        seed: Seed that draws the documents.
        out: JSON file to write. None: print only.
        common: Options of every command.
    """

    model: str
    data: Path
    split: str = "test"
    max_documents: int = 500
    max_tokens: int = 256
    step: Step = None
    seed: int = 0
    out: Path | None = None
    common: Common = field(default_factory=CommonOptions)

    def run(self) -> None:
        """Run the subcommand."""
        from search_r3_jax.evaluation.perplexity import measure_perplexity
        from search_r3_jax.outputs import message_stream

        result = measure_perplexity(
            self.model,
            self.data,
            split=self.split,
            max_documents=self.max_documents,
            max_tokens=self.max_tokens,
            step=self.step,
            seed=self.seed,
            out=self.out,
            inference=self,
        )
        print_line(
            f"{self.model}: perplexity {result['perplexity']:.4f} of {result['tokens']} tokens in "
            f"{result['texts']} documents",
            message_stream(self.out),
        )


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Draw the course of runs: nDCG@10 on their development queries, losses (stage 1), rewards (stage 2).

    Attributes:
        runs: One or more folders that `sft` or `rl` wrote.
        out: PNG file to write.
        common: Options of every command.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path
    common: Common = field(default_factory=CommonOptions)

    def run(self) -> None:
        """Run the subcommand."""
        from search_r3_jax.evaluation.curves import draw_curves
        from search_r3_jax.outputs import message_stream

        draw_curves(self.runs, self.out)
        print_line(str(self.out), message_stream(self.out))


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write runs, and results of `eval` and `budget`, as one HTML page without outside files.

    Attributes:
        runs: Folders that `sft` or `rl` wrote. Runs of one stage share a picture. Give some, or `--eval`.
        eval: Files of `eval --out` and `budget --out`. Give some, or runs.
        out: HTML file to write.
        pictures: Folder for the pictures as PNG files; created where it does not exist. None: no PNG files.
        common: Options of every command.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    eval: tuple[Path, ...] = ()
    out: Path = Path("report.html")
    pictures: Path | None = None
    common: Common = field(default_factory=CommonOptions)

    def run(self) -> None:
        """Run the subcommand."""
        from search_r3_jax.evaluation.page import write_report
        from search_r3_jax.outputs import message_stream

        write_report(self.runs, self.eval, self.out, self.pictures)
        print_line(str(self.out), message_stream(self.out))
