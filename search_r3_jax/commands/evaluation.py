"""Commands that measure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from search_r3_jax.config import Step
from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.settings import BudgetSettings, EvalSettings, MtebSettings


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
class Budget(BudgetSettings):
    """Measure what thinking is worth and what it costs: each budget of thinking tokens beside direct search.

    Attributes:
        debug: show the traceback of an error.
    """

    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.evaluation.budget import run_budget

        run_budget(self)


@dataclass(frozen=True, kw_only=True)
class Mteb(MtebSettings):
    """Measure a model with MTEB: its tasks, or collections of this machine as tasks of it.

    Attributes:
        debug: show the traceback of an error.
    """

    debug: bool = False

    def run(self) -> None:
        try:
            from search_r3_jax.evaluation.mteb_run import run_mteb
        except ImportError as error:
            raise UserError(
                f"mteb: {error.name or error} is not installed; run: pip install 'search_r3_jax[mteb]'"
            ) from None

        run_mteb(self)


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Whether the second of two results of `eval` is better than the first by more than chance, and on which
    queries.

    Attributes:
        first: a file of `eval --out`; where it holds several modes, append :direct, :reason or :average.
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
    """How well a model writes plain text: perplexity of documents, to hold a trained model against the one it
    started from.

    Attributes:
        model: a run directory, a Hugging Face folder, a GGUF file, or `smollm2`.
        data: a built data set or a BEIR folder.
        split: whose corpus is read.
        max_documents: so many random documents.
        max_tokens: tokens of a document that are read.
        step: checkpoint of a run, a number or `best` (on its development queries); the newest by default.
        seed: draws the documents.
        out: JSON file for the numbers.
        debug: show the traceback of an error.
    """

    model: str
    data: Path
    split: str = "test"
    max_documents: int = 500
    max_tokens: int = 256
    step: Step = None
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
        print(
            f"{self.model}: perplexity {found['perplexity']:.4f} of {found['tokens']} tokens in "
            f"{found['texts']} documents"
        )


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Draw how runs went: nDCG@10 on their development queries, and their losses.

    Attributes:
        runs: folders that sft or rl wrote to.
        out: PNG file.
        debug: show the traceback of an error.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path
    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.evaluation.curves import draw_curves

        draw_curves(self.runs, self.out)
        print(self.out)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Show runs, and results of `eval` and `budget`, on one HTML page that needs nothing else.

    Attributes:
        runs: folders that sft or rl wrote to; those of one stage are drawn together.
        eval: files of `eval --out` and `budget --out`.
        out: HTML file.
        pictures: folder for the page's pictures as PNG files; it is made where there is none.
        debug: show the traceback of an error.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    eval: tuple[Path, ...] = ()
    out: Path = Path("report.html")
    pictures: Path | None = None
    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.evaluation.page import write_report

        write_report(self.runs, self.eval, self.out, self.pictures)
        print(self.out)
