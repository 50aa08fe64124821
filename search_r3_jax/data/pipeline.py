"""Training batches as a pure function of the step: `PairPipeline.batch(step)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import grain.python as grain
import numpy as np

from search_r3_jax.data.collection import Collection
from search_r3_jax.data.key_terms import KeyTerms
from search_r3_jax.text.packing import bucket_length, pack_rows
from search_r3_jax.text.prompts import Prompter

ROW_TOKENS = 128


class PairBatch(NamedTuple):
    """B (query, document) pairs packed into rows [R,T]; N = B queries, then P documents, each a segment.

    Attributes:
        ids, positions, segments: [R,T] int32 as in `PackedRows`.
        prefixes: [R,T] int32, which shared prompt prefix a token stands behind: 0 direct, 1 reasoned.
        embed_at: [N] int32, flat position of each text's embed token.
        reply_at: [M] int32, flat positions of the queries' reply tokens, −1 filled.
        positive: [B] int32, each query's row of P.
        excluded: [B,P] bool, documents that are no negatives of a query.
    """

    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    prefixes: np.ndarray
    embed_at: np.ndarray
    reply_at: np.ndarray
    positive: np.ndarray
    excluded: np.ndarray


def shuffled(size: int, seed: int, start: int, count: int) -> list[int]:
    """Items `start` to `start + count` of an endless sequence of seeded shuffles of 0..size−1; a pure function of its arguments."""
    order = grain.MapDataset.range(size).shuffle(seed=seed).repeat()
    items = [order[start + i] for i in range(count)]
    return [item for item in items if item is not None]


@dataclass(frozen=True, kw_only=True)
class PairPipeline:
    """Pairs of a collection in a seeded order, tokenised; the state of the pipeline is the step alone.

    Raises ValueError when `global_batch` exceeds the number of pairs.
    """

    collection: Collection
    prompter: Prompter
    global_batch: int
    seed: int
    max_query_tokens: int
    max_document_tokens: int
    reasoned: int = 0
    key_terms: KeyTerms | None = None

    def pairs(self, step: int) -> list[tuple[int, int]]:
        """The `(query row, document row)` pairs of a step."""
        all_pairs = [
            (row, self.collection.row_of[doc_id]) for row, query in enumerate(self.collection.queries) for doc_id in sorted(query.positives)
        ]
        if self.global_batch > len(all_pairs):
            raise ValueError(f"global_batch {self.global_batch} exceeds the {len(all_pairs)} pairs of {self.collection.name}")
        return [all_pairs[i] for i in shuffled(len(all_pairs), self.seed, step * self.global_batch, self.global_batch)]

    def batch(self, step: int) -> PairBatch:
        """The batch of a step."""
        pairs = self.pairs(step)
        queries = [self.collection.queries[query] for query, _ in pairs]
        documents = [self.collection.documents[document] for _, document in pairs]
        direct = self.global_batch - self.reasoned
        thoughts = [self._thought(document) for _, document in pairs[direct:]]
        reasoned_rows = self.prompter.reason_rows([query.text for query in queries[direct:]], self.max_query_tokens)
        rows = [
            *self.prompter.direct_rows([query.text for query in queries[:direct]], self.max_query_tokens),
            *[row + thought for row, thought in zip(reasoned_rows, thoughts, strict=True)],
            *self.prompter.direct_rows([document.body for document in documents], self.max_document_tokens),
        ]
        closing = len(self.prompter.direct.closing)
        replies = [closing] * direct + [len(thought) for thought in thoughts]
        is_reasoned = np.array([direct <= i < self.global_batch for i in range(len(rows))])

        starts = [len(self.prompter.of("reason" if flag else "direct").prefix) for flag in is_reasoned]
        longest = max(len(row) for row in rows)
        packed = pack_rows(
            rows, starts, length=max(ROW_TOKENS, bucket_length(longest)), pad_id=0, row_multiple=max(1, self.global_batch // 4)
        )
        T = packed.ids.shape[1]
        flat = packed.starts[:, 0] * T + packed.starts[:, 1]
        ends = flat + np.array([len(row) for row in rows])
        reply_at = np.concatenate([np.arange(end - reply, end) for end, reply in zip(ends, replies, strict=False)])
        ids = np.array([document for _, document in pairs])
        known = [{self.collection.row_of[doc_id] for doc_id in query.positives} for query in queries]
        return PairBatch(
            ids=packed.ids,
            positions=packed.positions,
            segments=packed.segments,
            prefixes=np.where(packed.segments >= 0, is_reasoned[packed.segments], 0).astype(np.int32),
            embed_at=(ends - 1).astype(np.int32),
            reply_at=_filled(reply_at, 16 * self.global_batch),
            positive=np.arange(self.global_batch, dtype=np.int32),
            # A copy of the positive, or another known positive, must not be pushed away as a negative.
            excluded=np.array([[other in positives for other in ids] for positives in known]),
        )

    def _thought(self, document: int) -> list[int]:
        if self.key_terms is None:
            raise ValueError("reasoned examples need key terms")
        return self.prompter.thought_ids(self.key_terms.thought(document))


def _filled(values: np.ndarray, multiple: int) -> np.ndarray:
    """Filled with −1 up to a multiple, so that few shapes are compiled."""
    filled = np.full(-(-len(values) // multiple) * multiple, -1, dtype=np.int32)
    filled[: len(values)] = values
    return filled
