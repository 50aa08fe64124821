"""Training batches of stage 1 as a pure function of the step: `PairPipeline.batch(step)`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from search_r3_jax.data.collection import Query
from search_r3_jax.data.known_relevance import first_copies, known_documents
from search_r3_jax.data.mixture import Mixture, Pair
from search_r3_jax.data.tfidf_reasoning import TfidfReasoning
from search_r3_jax.text.packing import bucket_length, pack_rows
from search_r3_jax.text.prompts import Prompter

ROW_TOKENS = 256
PAD = -1
ROW_FIELDS = ("ids", "positions", "segments", "prefixes")


class TextChunks(NamedTuple):
    """Texts packed into C chunks of rows [R,T], N texts a chunk.

    Attributes:
        ids, positions, segments: [C,R,T] int32 as in `PackedRows`.
        prefixes: [C,R,T] int32, the shared prompt prefix before a token: 0 direct, 1 reasoned.
        embed_at: [C,N] int32, flat position in its chunk of each text's embed token.
        reply_at: [C,M] int32, flat positions of the reply tokens to learn, padded with −1; M = 0 without any.
    """

    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    prefixes: np.ndarray
    embed_at: np.ndarray
    reply_at: np.ndarray

    def padded(self, shares: int) -> TextChunks:
        """The same texts with R and M padded to multiples of `shares`."""
        fills = {"ids": 0, "positions": PAD, "segments": PAD, "prefixes": 0, "reply_at": PAD}
        return self._replace(
            **{name: _padded(getattr(self, name), shares, fill) for name, fill in fills.items()}
        )


class PairBatch(NamedTuple):
    """B queries and P documents: of each chunk its queries' positives, then their negatives.

    Attributes:
        document_ids: [P] int32, numbers through the documents of all sets, −1 for a missing negative.
        known_ids: [B,K] int32, documents of the batch that are known to be relevant to a query, or to another
            one of the same text, or copies of such; padded with −1. `known_relevance` [B,K] float32.
        mined: [B,n] int32, rows of P that hold the negatives of each query, −1 where there are too few.
    """

    queries: TextChunks
    documents: TextChunks
    document_ids: np.ndarray
    known_ids: np.ndarray
    known_relevance: np.ndarray
    mined: np.ndarray

    def padding_share(self) -> float:
        """Share of the computed tokens that are padding, in [0, 1]."""
        return float(
            np.mean(np.concatenate([self.queries.segments.ravel(), self.documents.segments.ravel()]) < 0)
        )

    def padded(self, shares: int) -> PairBatch:
        """The same batch with the rows of queries and documents padded to multiples of `shares`."""
        return self._replace(queries=self.queries.padded(shares), documents=self.documents.padded(shares))


@dataclass(frozen=True, kw_only=True)
class PairPipeline:
    """Tokenised and packed pairs of a mixture in a seeded order; the only state is the step.

    Attributes:
        encode_chunk: pairs that are encoded together; divides `global_batch`.
        reasoned: pairs of a chunk whose query is in the reasoned format.
        negatives: negative documents per query, judged irrelevant or mined.
        tfidf_reasoning: of each set, writes the reasoning where a query's `reasoning` is empty.
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
    tfidf_reasoning: tuple[TfidfReasoning, ...] = ()

    def __post_init__(self) -> None:
        if self.global_batch > self.mixture.size():
            raise ValueError(
                f"global_batch {self.global_batch} exceeds the {self.mixture.size()} pairs there are"
            )
        if self.encode_chunk < 1 or self.global_batch % self.encode_chunk:
            raise ValueError(
                f"encode_chunk {self.encode_chunk} does not divide global_batch {self.global_batch}"
            )

    def pairs(self, step: int) -> list[Pair]:
        """The pairs of a step."""
        return self.mixture.pairs(range(step * self.global_batch, (step + 1) * self.global_batch))

    def reasoned_pairs(self, step: int) -> list[Pair]:
        """The pairs of a step whose query is in the reasoned format."""
        pairs = self.pairs(step)
        return [
            pair for i, pair in enumerate(pairs) if i % self.encode_chunk >= self.encode_chunk - self.reasoned
        ]

    def batch(self, step: int) -> PairBatch:
        """The batch of a step."""
        pairs = self.pairs(step)
        chunks = [
            pairs[start : start + self.encode_chunk] for start in range(0, len(pairs), self.encode_chunk)
        ]
        return PairBatch(
            queries=self._packed([self._query_rows(chunk) for chunk in chunks]),
            documents=self._packed([self._document_rows(chunk) for chunk in chunks]),
            **self._judgements(chunks),
        )

    def _packed(self, chunks: list[_Rows]) -> TextChunks:
        T = self._row_tokens
        packed = [pack_rows(chunk.ids, chunk.starts, length=T, pad_id=0, row_multiple=1) for chunk in chunks]
        # One shape for all chunks, and few shapes from step to step: each is compiled once. A row costs far
        # more than a reply's token.
        R = _rounded(max(rows.ids.shape[0] for rows in packed), parts=8)
        M = _rounded(max(sum(chunk.replies) for chunk in chunks), parts=2)
        embed_at, reply_at, prefixes = [], [], []
        for chunk, rows in zip(chunks, packed, strict=True):
            ends = rows.starts[:, 0] * T + rows.starts[:, 1] + np.array([len(row) for row in chunk.ids])
            embed_at.append(ends - 1)
            at = [np.arange(end - reply, end) for end, reply in zip(ends, chunk.replies, strict=True)]
            reply_at.append(_filled(np.concatenate(at), M))
            # Padding has segment −1, which selects the last entry.
            prefixes.append(np.array([*chunk.prefixes, 0])[rows.segments])
        return TextChunks(
            ids=_stacked([rows.ids for rows in packed], R, 0),
            positions=_stacked([rows.positions for rows in packed], R, PAD),
            segments=_stacked([rows.segments for rows in packed], R, PAD),
            prefixes=_stacked(prefixes, R, 0),
            embed_at=np.stack(embed_at).astype(np.int32),
            reply_at=np.stack(reply_at).astype(np.int32),
        )

    @cached_property
    def _row_tokens(self) -> int:
        """Length of a row: a multiple of the longest text, at least ROW_TOKENS, as a bucket length."""
        direct, reason = self.prompter.direct, self.prompter.reason
        longest = (
            max(self.max_document_tokens, self.max_query_tokens) + len(direct.suffix) + len(direct.closing)
        )
        reasoned = self.max_query_tokens + len(reason.suffix) + self.max_thought_tokens + len(reason.closing)
        longest = max(longest, reasoned if self.reasoned else 0)
        return bucket_length(-(-ROW_TOKENS // longest) * longest)

    @cached_property
    def _first_document(self) -> list[int]:
        """The number of each set's first document among the documents of all sets."""
        sizes = [len(collection.documents) for collection in self.mixture.collections]
        return [sum(sizes[:i]) for i in range(len(sizes))]

    @cached_property
    def _first_copy(self) -> np.ndarray:
        """For each document of all sets, the number of the first one with the same text."""
        return first_copies(self.mixture.collections)

    @cached_property
    def _known(self) -> list[tuple[dict[int, int], ...]]:
        """Of each set, each query's known documents: number of a first copy → grade."""
        return known_documents(self.mixture.collections, self._first_copy)

    @cached_property
    def _most_known(self) -> int:
        """K: as many known documents, with their copies, as any query has, or as a batch holds."""
        copies = np.bincount(self._first_copy)
        most = max(int(copies[list(grades)].sum()) for of_set in self._known for grades in of_set)
        return min(most, self.global_batch * (1 + self.negatives))

    def _copy_number(self, number: int, row: int) -> int:
        """The number of the first copy of a set's document."""
        return int(self._first_copy[self._first_document[number] + row])

    def _negatives(self, pair: Pair) -> list[int]:
        """Rows of a pair's negatives, padded with PAD; the pair's place seeds the choice among many.

        A text that is known to be relevant is never one, under whatever id.
        """
        collection, relevant = self.mixture.collections[pair.set], self._known[pair.set][pair.query]
        rows = [collection.row_of[doc_id] for doc_id in collection.queries[pair.query].negatives]
        rows = [row for row in rows if self._copy_number(pair.set, row) not in relevant]
        if len(rows) > self.negatives:
            rows = [
                rows[i]
                for i in np.random.default_rng([self.mixture.seed, pair.place]).choice(
                    len(rows), self.negatives, replace=False
                )
            ]
        return rows + [PAD] * (self.negatives - len(rows))

    def _query_rows(self, chunk: list[Pair]) -> _Rows:
        direct = self.encode_chunk - self.reasoned
        texts = [self._query(pair).body for pair in chunk]
        thoughts = [self._thought(pair) for pair in chunk[direct:]]
        reasoned = self.prompter.reason_rows(texts[direct:], self.max_query_tokens)
        return _Rows(
            ids=[
                *self.prompter.direct_rows(texts[:direct], self.max_query_tokens),
                *[row + thought for row, thought in zip(reasoned, thoughts, strict=True)],
            ],
            starts=[len(self.prompter.direct.prefix)] * direct
            + [len(self.prompter.reason.prefix)] * self.reasoned,
            prefixes=[0] * direct + [1] * self.reasoned,
            replies=[len(self.prompter.direct.closing)] * direct + [len(thought) for thought in thoughts],
        )

    def _document_rows(self, chunk: list[Pair]) -> _Rows:
        bodies = [
            self.mixture.collections[number].documents[row].body if row != PAD else ""
            for number, row in self._documents(chunk)
        ]
        rows = self.prompter.direct_rows(bodies, self.max_document_tokens)
        return _Rows(
            ids=rows,
            starts=[len(self.prompter.direct.prefix)] * len(rows),
            prefixes=[0] * len(rows),
            replies=[0] * len(rows),
        )

    def _documents(self, chunk: list[Pair]) -> list[tuple[int, int]]:
        """`(set, row)` of a chunk's documents: the positives, then each query's negatives."""
        negatives = [(pair.set, row) for pair in chunk for row in self._negatives(pair)]
        return [(pair.set, pair.document) for pair in chunk] + negatives

    def _judgements(self, chunks: list[list[Pair]]) -> dict[str, np.ndarray]:
        document_ids, mined = list[int](), list[list[int]]()
        for chunk in chunks:
            first_row = len(document_ids)
            document_ids += [
                self._first_document[number] + row if row != PAD else PAD
                for number, row in self._documents(chunk)
            ]
            for i in range(len(chunk)):
                mined_rows = range(
                    first_row + len(chunk) + i * self.negatives,
                    first_row + len(chunk) + (i + 1) * self.negatives,
                )
                mined.append([row if document_ids[row] != PAD else PAD for row in mined_rows])
        # What is known of documents elsewhere decides nothing: a text may have thousands of copies.
        present: dict[int, list[int]] = {}
        for document in dict.fromkeys(document_ids):
            if document != PAD:
                present.setdefault(int(self._first_copy[document]), []).append(document)
        K = self._most_known
        known_ids = np.full((self.global_batch, K), PAD, np.int32)
        relevance = np.zeros((self.global_batch, K), np.float32)
        for b, pair in enumerate(pair for chunk in chunks for pair in chunk):
            grades = self._known[pair.set][pair.query]
            known = {row: grade for copy, grade in grades.items() for row in present.get(copy, ())}
            known_ids[b, : len(known)] = list(known)
            relevance[b, : len(known)] = list(known.values())
        return {
            "document_ids": np.array(document_ids, np.int32),
            "known_ids": known_ids,
            "known_relevance": relevance,
            "mined": np.array(mined, np.int32).reshape(self.global_batch, self.negatives),
        }

    def _query(self, pair: Pair) -> Query:
        return self.mixture.collections[pair.set].queries[pair.query]

    def _thought(self, pair: Pair) -> list[int]:
        reasoning = self._query(pair).reasoning
        if not reasoning and not self.tfidf_reasoning:
            raise ValueError("reasoned examples need a reasoning column or key terms")
        return self.prompter.thought_ids(
            reasoning or self.tfidf_reasoning[pair.set].thought(pair.document), self.max_thought_tokens
        )


class _Rows(NamedTuple):
    """Texts of a chunk: token rows, first positions, prefix numbers, lengths of the replies to learn."""

    ids: list[list[int]]
    starts: list[int]
    prefixes: list[int]
    replies: list[int]


def _rounded(count: int, *, parts: int) -> int:
    """Round up to a multiple of (the power of two below) / parts: adds at most 1/parts.

    More than four rows are rounded to an even number.
    """
    step = max(2 if count > 4 else 1, (1 << max(0, count.bit_length() - 1)) // parts)
    return -(-count // step) * step


def _filled(values: np.ndarray, count: int) -> np.ndarray:
    return np.pad(values, (0, count - len(values)), constant_values=PAD)


def _padded(x: np.ndarray, multiple: int, fill: int) -> np.ndarray:
    """Pad the second axis to a multiple."""
    return np.pad(x, ((0, 0), (0, -x.shape[1] % multiple), *((0, 0),) * (x.ndim - 2)), constant_values=fill)


def _stacked(chunks: list[np.ndarray], R: int, fill: int) -> np.ndarray:
    return np.stack([np.pad(rows, ((0, R - rows.shape[0]), (0, 0)), constant_values=fill) for rows in chunks])
