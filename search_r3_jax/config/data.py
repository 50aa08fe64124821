"""Which data sets a run uses, and how texts become tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How texts become tokens.

    Attributes:
        max_query_tokens: Longest query, in tokens. The prompt around it is never cut.
        max_document_tokens: Longest document, in tokens.
        max_thought_tokens: Longest given reasoning (stage 1), in tokens. The closing after it is never cut.
    """

    max_query_tokens: int = 64
    max_document_tokens: int = 256
    max_thought_tokens: int = 64


@dataclass(frozen=True, kw_only=True)
class FunctionsConfig:
    """How large a data set the quickstart builds from the functions of installed packages.

    Attributes:
        train: Functions to train on.
        dev: Functions of the development split.
        test: Functions to search in the test.
        test_queries: Test functions that are searched for.
    """

    train: int = 0
    dev: int = 0
    test: int = 0
    test_queries: int = 0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data sets to train on and to evaluate on during training.

    Attributes:
        sets: Required. Folders of data sets: built by `data build`, or in BEIR's layout.
        weights: Each set's share of the training pairs. Empty: in proportion to their number of pairs.
        batches: Stage 1: `mixed` draws every pair from any set; `one_set` draws all pairs of a step from one
            set, whose documents are harder negatives for each other.
        split: Split to train on.
        dev_split: Split to evaluate on during training. A set without it gives up some training queries.
        dev_queries: Development queries per set, at most. 0 evaluates nothing during training.
        dev_documents: Documents per set to search during training: all that are judged for the development
            queries, filled up with others.
        rl_queries: Stage 2: number of training queries to use. 0 uses all.
        rl_documents: Stage 2: documents to search: all that are judged for the training queries, filled up
            with others. 0 searches the whole corpus.
        functions: Size of the data set that the quickstart builds.
    """

    sets: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    batches: Literal["mixed", "one_set"] = "mixed"
    split: str = "train"
    dev_split: str = "dev"
    dev_queries: int = 128
    dev_documents: int = 1000
    rl_queries: int = 0
    rl_documents: int = 0
    functions: FunctionsConfig = field(default_factory=FunctionsConfig)
