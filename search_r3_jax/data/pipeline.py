"""Training batches of stage 1 as a pure function of the step: `PairPipeline.batch(step)`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from search_r3_jax.data.collection import Collection, Query
from search_r3_jax.data.key_terms import KeyTerms
from search_r3_jax.data.mixture import Mixture, Pair
from search_r3_jax.text.packing import bucket_length, pack_rows
from search_r3_jax.text.prompts import Prompter

ROW_TOKENS = 256
FILLER = -1


class PairBatch(NamedTuple):
    """B queries and their P documents, packed into C chunks of rows [R,T]; N texts a chunk: its queries, their positives, their negatives.

    Attributes:
        ids, positions, segments: [C,R,T] int32 as in `PackedRows`.
        prefixes: [C,R,T] int32, which shared prompt prefix a token stands behind: 0 direct, 1 reasoned.
        embed_at: [C,N] int32, flat position in its chunk of each text's embed token; −1 for a negative that there is none of.
        reply_at: [C,M] int32, flat positions of the queries' reply tokens, −1 filled.
        query_at, document_at: [B], [P] int32, each text's place among the C·N texts.
        document_ids: [P] int32, the same for the same document, −1 for one that there is none of.
        known_ids: [B,K] int32, documents known to be relevant to a query, −1 filled; `known_relevance` [B,K] float32.
    """

    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    prefixes: np.ndarray
    embed_at: np.ndarray
    reply_at: np.ndarray
    query_at: np.ndarray
    document_at: np.ndarray
    document_ids: np.ndarray
    known_ids: np.ndarray
    known_relevance: np.ndarray

    def padding_share(self) -> float:
        """The share of the computed tokens that are padding, in [0, 1]."""
        return float(np.mean(self.segments < 0))


@dataclass(frozen=True, kw_only=True)
class PairPipeline:
    """Pairs of a mixture in a seeded order, tokenised and packed; the state of the pipeline is the step alone.

    Attributes:
        encode_chunk: pairs that are encoded together; divides `global_batch`.
        reasoned: of the pairs of a chunk, how many have their query in the reasoned format.
        negatives: judged irrelevant or mined documents a query.
        key_terms: writes the reasoning of a document where its query's own `reasoning` is empty.
    """

    mixture: Mixture
    prompter: Prompter
    global_batch: int
    encode_chunk: int
    max_query_tokens: int
    max_document_tokens: int
    max_thought_tokens: int = 64
    reasoned: int = 0
    negatives: int = 0
    key_terms: tuple[KeyTerms, ...] = ()

    def __post_init__(self) -> None:
        if self.global_batch > self.mixture.size():
            raise ValueError(f"global_batch {self.global_batch} exceeds the {self.mixture.size()} pairs there are")
        if self.encode_chunk < 1 or self.global_batch % self.encode_chunk:
            raise ValueError(f"encode_chunk {self.encode_chunk} does not divide global_batch {self.global_batch}")

    def pairs(self, step: int) -> list[Pair]:
        """The pairs of a step."""
        return self.mixture.pairs(range(step * self.global_batch, (step + 1) * self.global_batch))

    def batch(self, step: int) -> PairBatch:
        """The batch of a step."""
        pairs = self.pairs(step)
        chunks = [pairs[start : start + self.encode_chunk] for start in range(0, len(pairs), self.encode_chunk)]
        texts = [self._texts(chunk) for chunk in chunks]
        packed = [
            pack_rows(rows, starts, length=self._row_tokens, pad_id=0, row_multiple=1) for rows, starts, _, _ in texts
        ]
        # One shape for all chunks, and few shapes from step to step.
        R = _rounded(max(rows.ids.shape[0] for rows in packed))
        M = _rounded(max(sum(replies) for _, _, replies, _ in texts))
        T = self._row_tokens
        embed_at, reply_at, prefixes = [], [], []
        for (rows, _, replies, present), packed_rows in zip(texts, packed, strict=True):
            flat = packed_rows.starts[:, 0] * T + packed_rows.starts[:, 1]
            ends = flat + np.array([len(row) for row in rows])
            embed_at.append(np.where(present, ends - 1, FILLER).astype(np.int32))
            at = np.concatenate([np.arange(end - reply, end) for end, reply in zip(ends, replies, strict=False)])
            reply_at.append(np.pad(at, (0, M - len(at)), constant_values=FILLER).astype(np.int32))
            direct = self.encode_chunk - self.reasoned
            is_reasoned = np.array([direct <= i < self.encode_chunk for i in range(len(rows))])
            prefixes.append(np.where(packed_rows.segments >= 0, is_reasoned[packed_rows.segments], 0).astype(np.int32))
        return PairBatch(
            ids=_stacked([rows.ids for rows in packed], R, 0),
            positions=_stacked([rows.positions for rows in packed], R, FILLER),
            segments=_stacked([rows.segments for rows in packed], R, FILLER),
            prefixes=_stacked(prefixes, R, 0),
            embed_at=np.stack(embed_at),
            reply_at=np.stack(reply_at),
            **self._judgements(chunks),
        )

    @cached_property
    def _row_tokens(self) -> int:
        """The length of a row: the longest text fits, and several of the usual ones do."""
        direct, reason = self.prompter.direct, self.prompter.reason
        longest = max(self.max_document_tokens, self.max_query_tokens) + len(direct.suffix) + len(direct.closing)
        reasoned = self.max_query_tokens + len(reason.suffix) + self.max_thought_tokens + len(reason.closing)
        return max(ROW_TOKENS, bucket_length(max(longest, reasoned if self.reasoned else 0)))

    @cached_property
    def _first_document(self) -> list[int]:
        """The number of each set's first document among the documents of all sets."""
        sizes = [len(collection.documents) for collection in self.mixture.collections]
        return [sum(sizes[:i]) for i in range(len(sizes))]

    @cached_property
    def _most_known(self) -> int:
        return max(len(query.positives) for collection in self.mixture.collections for query in collection.queries)

    def _negatives(self, pair: Pair) -> list[int]:
        """Rows of a pair's negatives, FILLER where there are not enough; which of many is decided by the pair's place alone."""
        collection = self.mixture.collections[pair.set]
        known = [collection.row_of[doc_id] for doc_id in collection.queries[pair.query].negatives]
        if len(known) > self.negatives:
            known = [known[i] for i in np.random.default_rng([self.mixture.seed, pair.place]).choice(len(known), self.negatives, replace=False)]
        return known + [FILLER] * (self.negatives - len(known))

    def _texts(self, chunk: list[Pair]) -> tuple[list[list[int]], list[int], list[int], np.ndarray]:
        """Of a chunk's N texts: token rows, first positions, lengths of the queries' replies, and which texts there really are."""
        direct = self.encode_chunk - self.reasoned
        queries = [self._query(pair).text for pair in chunk]
        thoughts = [self._thought(pair) for pair in chunk[direct:]]
        documents = [(pair.set, pair.document) for pair in chunk] + [(pair.set, row) for pair in chunk for row in self._negatives(pair)]
        bodies = [self.mixture.collections[number].documents[row].body if row != FILLER else "" for number, row in documents]
        reasoned_rows = self.prompter.reason_rows(queries[direct:], self.max_query_tokens)
        rows = [
            *self.prompter.direct_rows(queries[:direct], self.max_query_tokens),
            *[row + thought for row, thought in zip(reasoned_rows, thoughts, strict=True)],
            *self.prompter.direct_rows(bodies, self.max_document_tokens),
        ]
        prefix, reason_prefix = len(self.prompter.direct.prefix), len(self.prompter.reason.prefix)
        starts = [prefix] * direct + [reason_prefix] * self.reasoned + [prefix] * len(documents)
        replies = [len(self.prompter.direct.closing)] * direct + [len(thought) for thought in thoughts]
        present = np.array([True] * len(chunk) + [row != FILLER for _, row in documents])
        return rows, starts, replies, present

    def _judgements(self, chunks: list[list[Pair]]) -> dict[str, np.ndarray]:
        """Where queries and documents stand among the texts, and what is known of them."""
        B, n = self.encode_chunk, self.negatives
        N = B * (2 + n)
        query_at = np.concatenate([c * N + np.arange(B) for c in range(len(chunks))])
        document_at = np.concatenate([c * N + B + np.arange(B * (1 + n)) for c in range(len(chunks))])
        document_ids, known_ids, relevance = [], [], []
        for chunk in chunks:
            negatives = [(pair.set, row) for pair in chunk for row in self._negatives(pair)]
            documents = [(pair.set, pair.document) for pair in chunk] + negatives
            document_ids += [self._first_document[number] + row if row != FILLER else FILLER for number, row in documents]
            for pair in chunk:
                collection, first = self.mixture.collections[pair.set], self._first_document[pair.set]
                positives = self._query(pair).positives
                fill = [FILLER] * (self._most_known - len(positives))
                known_ids.append([first + collection.row_of[doc_id] for doc_id in positives] + fill)
                relevance.append([*positives.values(), *[0] * len(fill)])
        return {
            "query_at": query_at.astype(np.int32),
            "document_at": document_at.astype(np.int32),
            "document_ids": np.array(document_ids, np.int32),
            "known_ids": np.array(known_ids, np.int32),
            "known_relevance": np.array(relevance, np.float32),
        }

    def _query(self, pair: Pair) -> Query:
        return self.mixture.collections[pair.set].queries[pair.query]

    def _thought(self, pair: Pair) -> list[int]:
        own = self._query(pair).reasoning
        if not own and not self.key_terms:
            raise ValueError("reasoned examples need a reasoning column or key terms")
        return self.prompter.thought_ids(own or self.key_terms[pair.set].thought(pair.document), self.max_thought_tokens)


def single(collection: Collection, *, seed: int) -> Mixture:
    """The mixture of one collection."""
    return Mixture(collections=(collection,), seed=seed)


def _rounded(count: int) -> int:
    """Up to a multiple of a sixteenth of the power of two below: at most 6 % more."""
    step = max(1, (1 << (count.bit_length() - 1)) // 16)
    return -(-count // step) * step


def _stacked(chunks: list[np.ndarray], R: int, fill: int) -> np.ndarray:
    return np.stack([np.pad(rows, ((0, R - rows.shape[0]), (0, 0)), constant_values=fill) for rows in chunks])
