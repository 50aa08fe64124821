"""Commands that build data sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from search_r3_jax.commands.options import Common, CommonOptions
from search_r3_jax.config import InferenceConfig, Step, TextConfig
from search_r3_jax.console import print_line
from search_r3_jax.errors import UserError

if TYPE_CHECKING:
    from search_r3_jax.data.collection import Collection


@dataclass(frozen=True, kw_only=True)
class DataBuild:
    """Build a TFDS data set (array_record) from a BEIR folder, a .jsonl file, a table or Python packages.

    Attributes:
        source: What to read: `beir`, a folder in BEIR's layout; `jsonl`, a file with a query and its
            documents per line; `table`, a .csv, .tsv, .parquet or .jsonl file or a Hugging Face data set,
            with a query and an answer per row; `python-functions`, Python packages.
        out: Folder to write. Must not exist, or hold the same data set.
        input: Folder or file to read; with `table` also the id of a data set on the Hugging Face hub.
            With `python-functions`, None reads the installed packages.
        split: Splits to build. Empty: all there are.
        skip_bad: Leave bad lines out: name the first 20, count the rest. Otherwise the first bad line ends
            the build.
        fields: table: what its columns are, such as query=question positive=answer. Names: query, positive,
            negative (any number), title, relevance, doc_id (of the positive), instruction, reasoning, split,
            query_id. Empty: the columns that have these names.
        split_test: table: share of the queries to hold out as split `test`, such as 0.1. Queries of one text,
            or with a positive in common, stay together.
        split_dev: table: the same for split `dev`.
        seed: Seed of what is drawn: functions and their packages, or the queries to hold out.
        train_functions: python-functions: functions of the train split.
        dev_functions: python-functions: functions of the dev split.
        test_functions: python-functions: functions of the test split.
        common: Options of every command.
    """

    source: Literal["beir", "jsonl", "table", "python-functions"]
    out: Path
    input: Path | None = None
    split: tuple[str, ...] = ()
    skip_bad: bool = False
    fields: tuple[str, ...] = ()
    split_test: float | None = None
    split_dev: float | None = None
    seed: int = 0
    train_functions: int = 384
    dev_functions: int = 50
    test_functions: int = 600
    common: Common = field(default_factory=CommonOptions)

    def run(self) -> None:
        """Run the subcommand."""
        from search_r3_jax.data.build import FunctionCounts, build_beir, build_jsonl, build_python_functions

        self._check_table_flags()
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
        elif self.source == "table":
            self._build_table(self.input)
            return
        elif self.source == "beir":
            collections = build_beir(self.input, self.out, splits=self.split, skip_bad=self.skip_bad)
        else:
            collections = build_jsonl(self.input, self.out, splits=self.split, skip_bad=self.skip_bad)
        self._print_counts(collections)

    def _check_table_flags(self) -> None:
        given = {"--fields": self.fields, "--split-test": self.split_test, "--split-dev": self.split_dev}
        for flag, value in given.items():
            if self.source != "table" and value not in ((), None):
                raise UserError(f"{flag}: is for --source table; leave it out")

    def _build_table(self, source: Path) -> None:
        from search_r3_jax.data.build import TableOptions, build_table
        from search_r3_jax.data.examples import example_lines

        shares = {"test": self.split_test, "dev": self.split_dev}
        options = TableOptions(
            fields=self.fields,
            shares={split: share for split, share in shares.items() if share is not None},
            seed=self.seed,
        )
        built = build_table(source, self.out, options=options, splits=self.split, skip_bad=self.skip_bad)
        print_line(f"{source}: {built.content.rows} rows, {built.columns}")
        if built.content.unanswered:
            print(f"left out: {built.content.unanswered} queries that no document is relevant to")
        self._print_counts(built.collections)
        for line in example_lines(built.collections):
            print_line(line)

    def _print_counts(self, collections: Mapping[str, Collection]) -> None:
        for split, collection in collections.items():
            print_line(
                f"{self.out}: {split}: {len(collection.queries)} queries over {len(collection.documents)} "
                "documents"
            )


@dataclass(frozen=True, kw_only=True)
class DataMine(InferenceConfig):
    """Write a data set with hard negatives: the nearest documents that are not known to be relevant.

    Attributes:
        model: Run folder, Hugging Face folder or id, GGUF file, or `smollm2` (SmolLM2-135M-Instruct, as
            installed).
        data: Built data set or BEIR folder.
        out: Folder to write. Must not exist.
        split: Split whose queries get negatives. The other splits are copied.
        num_negatives: Negatives to add per query, at most.
        first_rank: First rank to take from. Rank 0 is the most similar document that is not judged.
        last_rank: Stop before this rank: first-rank 0 and last-rank 4 take ranks 0 to 3. None: enough ranks
            for `num-negatives`, ten times as many with a limit or random sampling.
        margin: Leave out documents whose cosine is not at least this much below that of the weakest positive.
            None: no limit.
        relative_margin: The same limit as a share of the weakest positive's cosine. None: no limit.
        max_score: Leave out documents with a higher cosine. None: no limit.
        sampling: `top`: the most similar documents that are left; `random`: a random choice of them.
        seed: Seed of random sampling.
        index: How to search: `exact`, `scann`, or `auto`: ScaNN where it is installed, else exact search.
        max_query_tokens: Longest query, in tokens.
        max_document_tokens: Longest document, in tokens.
        step: Checkpoint of a run: a step or `best` (on its development queries). None: the newest.
        common: Options of every command.
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
    common: Common = field(default_factory=CommonOptions)

    def run(self) -> None:
        """Run the subcommand."""
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
            inference=self,
        )
        print(f"{counts.queries} queries of split {self.split}, {counts.documents} different documents")
        print(f"{counts.mined} negatives mined; {counts.short} queries have fewer than {self.num_negatives}")
        print(
            f"left out: {counts.positives} known to be relevant, {counts.judged} negatives already, "
            f"{counts.too_close} within a limit"
        )
        print_line(f"written to {self.out}")
