"""Commands that build data sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from search_r3_jax.config import Step, TextConfig
from search_r3_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataBuild:
    """Build a TFDS data set (array_record) from a BEIR folder, a .jsonl file or installed Python packages.

    Attributes:
        source: `beir` reads a folder, `jsonl` a file with a query and its documents a line,
            `python-functions` Python packages.
        out: folder to write; must not exist, or hold the same data set.
        input: what the source reads; `python-functions` takes the installed packages by default.
        split: the splits to build; all that are there by default.
        skip_bad: leave bad lines out, name the first 20 and count them; otherwise the first one ends the
            build.
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
            print(
                f"{self.out}: {split}: {len(collection.queries)} queries over {len(collection.documents)} "
                "documents"
            )


@dataclass(frozen=True, kw_only=True)
class DataMine:
    """Add hard negatives to the queries of a split: the nearest documents that are not known to be relevant;
    a new data set.

    Attributes:
        model: a run directory, a Hugging Face folder, a GGUF file, or `smollm2`.
        data: a built data set or a BEIR folder.
        out: folder to write; must not exist.
        split: whose queries get negatives; the others are carried over.
        num_negatives: at most so many for each query, behind those it has.
        first_rank: first rank to choose from; 0 is the most similar document that is not judged.
        last_rank: first rank not to choose from; by default so that num-negatives fit, ten times as many with
            a limit or random sampling.
        margin: least distance below the cosine of the query's weakest positive.
        relative_margin: the same, as a share of that cosine.
        max_score: highest cosine.
        sampling: `top` takes the most similar ones of those left, `random` any.
        seed: of random sampling.
        index: how documents are searched; `auto` is ScaNN where it is installed.
        max_query_tokens: tokens of a query that are read.
        max_document_tokens: tokens of a document that are read.
        step: checkpoint of a run, a number or `best` (on its development queries); the newest by default.
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
    step: Step = None
    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.retrieval.mining.dataset import mine_dataset
        from search_r3_jax.retrieval.mining.select import MiningOptions

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
        print(
            f"left out: {counts.positives} known to be relevant, {counts.judged} negatives already, "
            f"{counts.too_close} within a limit"
        )
        print(f"written to {self.out}")
