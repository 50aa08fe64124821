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
        model: a run directory, a Hugging Face folder, a GGUF file or `smollm2`; or a baseline: `bm25` (stemmed words), `bm25-split`
            (identifiers split, for code), `minilm` (all-MiniLM-L6-v2), `st:FOLDER` (any sentence-transformers model).
        data: a built data set or a BEIR folder.
        split: whose queries are searched.
        mode: `reason` lets the model think before it embeds a query; baselines have `direct` only.
        index: `exact` search, or `scann`.
        out: JSON file with everything, each query's results too; `search-r3 compare` reads it.
        run_file: TREC run file; the judgements go beside it, with .qrels added. With both modes one file each: .direct and .reason added.
        max_documents: search only the judged documents and random others, so many in all.
        seed: draws those others.
        max_query_tokens: tokens of a query that a model of ours reads; 64 by default.
        max_document_tokens: tokens of a document that a model of ours reads; 256 by default.
        max_think_tokens: budget of the reasoning before the embed token is forced.
        step: checkpoint of a run, a number or `best` (on its development queries); the newest by default.
    """

    model: str
    data: Path
    split: str = "test"
    mode: Literal["direct", "reason", "both"] = "direct"
    index: Literal["exact", "scann"] = "exact"
    out: Path | None = None
    run_file: Path | None = None
    max_documents: int | None = None
    seed: int = 0
    max_query_tokens: int | None = None
    max_document_tokens: int | None = None
    max_think_tokens: int = 32
    step: Step = None

    def text(self) -> TextConfig:
        """How texts are cut for a model of ours."""
        usual = TextConfig()
        return TextConfig(
            max_query_tokens=self.max_query_tokens or usual.max_query_tokens,
            max_document_tokens=self.max_document_tokens or usual.max_document_tokens,
        )
