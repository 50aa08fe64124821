"""What an evaluation is asked for. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from search_r3_jax.config import Step, TextConfig


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """One system on one split of one collection.

    Attributes:
        model: a run directory, a Hugging Face folder, a GGUF file or `smollm2`; or a baseline: `bm25`
            (stemmed words), `bm25-split` (identifiers split, for code), `minilm` (all-MiniLM-L6-v2),
            `st:FOLDER` (any sentence-transformers model).
        data: a built data set or a BEIR folder.
        split: whose queries are searched.
        mode: `reason` lets the model think before it embeds a query; `both` is that beside direct; `all` adds
            `average`, the mean of a query's two vectors; baselines have `direct` only.
        index: `exact` search, or `scann`.
        out: JSON file with everything, each query's results too; `search-r3 compare` reads it.
        run_file: TREC run file; the judgements go beside it, with .qrels added. With several modes one file
            each: .direct, .reason added.
        max_queries: search for so many random queries of the split at most.
        max_documents: search only the judged documents and random others, so many in all.
        seed: draws those queries and those others.
        max_query_tokens: tokens of a query that a model of ours reads; 64 by default.
        max_document_tokens: tokens of a document that a model of ours reads; 256 by default.
        max_think_tokens: budget of the reasoning before the embed token is forced; 0 forces it at once.
        controls: search also with other reasoning in place of the queries' own: another query's, none, the
            query repeated, random words.
        step: checkpoint of a run, a number or `best` (on its development queries); the newest by default.
    """

    model: str
    data: Path
    split: str = "test"
    mode: Literal["direct", "reason", "both", "all"] = "direct"
    index: Literal["exact", "scann"] = "exact"
    out: Path | None = None
    run_file: Path | None = None
    max_queries: int | None = None
    max_documents: int | None = None
    seed: int = 0
    max_query_tokens: int | None = None
    max_document_tokens: int | None = None
    max_think_tokens: int = 32
    controls: bool = False
    step: Step = None

    def text(self) -> TextConfig:
        """How texts are cut for a model of ours."""
        usual = TextConfig()
        return TextConfig(
            max_query_tokens=self.max_query_tokens or usual.max_query_tokens,
            max_document_tokens=self.max_document_tokens or usual.max_document_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class BudgetSettings:
    """One model on one split of one collection, at several budgets of thinking.

    Attributes:
        model: a run directory, a Hugging Face folder, a GGUF file or `smollm2`.
        data: a built data set or a BEIR folder.
        out: JSON file with everything, each query's results too.
        picture: PNG file for nDCG@10 over the tokens of a query.
        budgets: tokens that the model may think before the embed token is forced; 0 forces it at once.
        split: whose queries are searched.
        index: `exact` search, or `scann`.
        max_queries: search for so many random queries of the split at most.
        max_documents: search only the judged documents and random others, so many in all.
        seed: draws those queries and those others, and the bootstrap's queries.
        samples: of the bootstrap.
        max_query_tokens: tokens of a query that the model reads; 64 by default.
        max_document_tokens: tokens of a document that the model reads; 256 by default.
        step: checkpoint of a run, a number or `best` (on its development queries); the newest by default.
    """

    model: str
    data: Path
    out: Path
    picture: Path | None = None
    budgets: tuple[int, ...] = (0, 8, 16, 32, 64)
    split: str = "test"
    index: Literal["exact", "scann"] = "exact"
    max_queries: int | None = None
    max_documents: int | None = None
    seed: int = 0
    samples: int = 10_000
    max_query_tokens: int | None = None
    max_document_tokens: int | None = None
    step: Step = None

    def evaluation(self) -> EvalSettings:
        """What `eval` is asked for at the largest budget."""
        return EvalSettings(
            model=self.model,
            data=self.data,
            split=self.split,
            mode="both",
            index=self.index,
            max_queries=self.max_queries,
            max_documents=self.max_documents,
            seed=self.seed,
            max_query_tokens=self.max_query_tokens,
            max_document_tokens=self.max_document_tokens,
            max_think_tokens=max(self.budgets),
            step=self.step,
        )


@dataclass(frozen=True, kw_only=True)
class MtebSettings:
    """One model on tasks of MTEB, and on collections of this machine as tasks of it.

    Attributes:
        model: an exported folder, a run directory, a Hugging Face folder or id, a GGUF file or `smollm2`.
        out: folder for MTEB's own files; tasks whose results are there are not run again.
        tasks: names of MTEB's tasks, as in SciFact; their data comes from the hub.
        data: built data sets or BEIR folders, a retrieval task each.
        split: of the data sets, whose queries are searched.
        mode: `reason` lets the model think before it embeds what is searched for.
        instruction_template: puts a task's own instruction before its queries, as in 'Instruct:
            {instruction}: '; left out by default.
        max_documents: of the data sets, search only the judged documents and random others, so many in all.
        seed: draws those others.
        max_tokens: of a text that the model reads; by default what an exported folder says, else 512.
        max_think_tokens: budget of the reasoning before the embed token is forced; 0 forces it at once.
        step: checkpoint of a run, a number or `best` (on its development queries); the newest by default.
    """

    model: str
    out: Path
    tasks: tuple[str, ...] = ()
    data: tuple[Path, ...] = ()
    split: str = "test"
    mode: Literal["direct", "reason"] = "direct"
    instruction_template: str | None = None
    max_documents: int | None = None
    seed: int = 0
    max_tokens: int | None = None
    max_think_tokens: int = 32
    step: Step = None

    def evaluation(self, folder: Path) -> EvalSettings:
        """What `eval` is asked for on one of the data sets."""
        return EvalSettings(
            model=self.model,
            data=folder,
            split=self.split,
            mode=self.mode,
            max_documents=self.max_documents,
            seed=self.seed,
            max_think_tokens=self.max_think_tokens,
            step=self.step,
        )
