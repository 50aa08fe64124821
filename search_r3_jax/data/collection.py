"""Documents, queries and collections in memory."""

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from search_r3_jax.data.corpus_facts import CorpusFacts, gather_facts

# TFDS reserves the split name "all".
SHARED_CORPUS = "shared"
RESERVED_SPLIT_NAMES = ("all", SHARED_CORPUS)


def usable_split_name(name: str) -> bool:
    """Whether a split of a data set may be called `name`."""
    return re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name) is not None and name not in RESERVED_SPLIT_NAMES


@dataclass(frozen=True, kw_only=True)
class Document:
    """One retrievable text; ids are unique within a collection."""

    doc_id: str
    title: str
    text: str

    @property
    def body(self) -> str:
        """The text that is embedded and indexed: the title line, if there is a title, then the text."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True, kw_only=True)
class Query:
    """One query; `positives` maps document ids to relevance > 0; `negatives` are judged irrelevant.

    Attributes:
        instruction: what kind of search this is, put before the text; empty for none.
        reasoning: a text that the model shall learn to write before it embeds; empty for none.
    """

    query_id: str
    text: str
    positives: Mapping[str, int]
    negatives: tuple[str, ...] = ()
    instruction: str = ""
    reasoning: str = ""

    @property
    def body(self) -> str:
        """The text that is embedded: `Instruct: …`, if there is an instruction, then `Query: …`.

        The format is that of E5 (arXiv 2401.00368) and of Qwen3-Embedding. Without an instruction the text
        stands alone.
        """
        return f"Instruct: {self.instruction}\nQuery: {self.text}" if self.instruction.strip() else self.text


class StoredCorpus(Sequence[Document]):
    """Documents that are not in memory, of which the facts are known."""

    @property
    @abstractmethod
    def facts(self) -> CorpusFacts:
        """Ids, hash and digests, without a pass over the documents where they were kept."""

    @abstractmethod
    def at(self, rows: Sequence[int]) -> tuple[Document, ...]:
        """The documents of these rows, in their order, read at once."""


@dataclass(frozen=True, kw_only=True)
class Collection:
    """The documents and queries of one split; a row is a position in `documents`.

    Attributes:
        documents: in memory, or a `StoredCorpus`.
        ignore_identical_ids: an evaluation leaves a document out of the results of the query with its id.
    """

    name: str
    split: str
    documents: Sequence[Document]
    queries: tuple[Query, ...]
    ignore_identical_ids: bool = False

    def qrels(self) -> dict[str, dict[str, int]]:
        """Query id → document id → relevance, 0 for a judged negative, as pytrec_eval takes it."""
        return {
            query.query_id: {**query.positives, **dict.fromkeys(query.negatives, 0)} for query in self.queries
        }

    @cached_property
    def facts(self) -> CorpusFacts:
        """Ids, hash and digests of the documents: kept with those on disk, else of one pass."""
        if isinstance(self.documents, StoredCorpus):
            return self.documents.facts
        return gather_facts((document.doc_id, document.body) for document in self.documents)

    @cached_property
    def document_ids(self) -> tuple[str, ...]:
        """Document ids by row."""
        if isinstance(self.documents, StoredCorpus):
            return self.documents.facts.ids
        return tuple(document.doc_id for document in self.documents)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Document id → row."""
        return {doc_id: row for row, doc_id in enumerate(self.document_ids)}

    def documents_at(self, rows: Sequence[int]) -> tuple[Document, ...]:
        """The documents of these rows, in their order."""
        if isinstance(self.documents, StoredCorpus):
            return self.documents.at(rows)
        return tuple(self.documents[row] for row in rows)

    def corpus_hash(self) -> str:
        """Hexadecimal sha256 over ids and bodies in order; equal hashes mean equal index rows."""
        return self.facts.corpus_hash


def trainable(collection: Collection) -> Collection:
    """The queries that a document of the corpus is relevant to, and judgements of its documents only.

    Published judgements may name documents that are not there, or whose text is empty: they count in an
    evaluation, but nothing can be learnt from them.
    """
    judged = {doc_id for query in collection.queries for doc_id in (*query.positives, *query.negatives)}
    usable = {
        doc_id
        for doc_id, blank in zip(collection.facts.ids, collection.facts.blank.tolist(), strict=True)
        if doc_id in judged and not blank
    }
    queries = (
        replace(
            query,
            positives={doc_id: score for doc_id, score in query.positives.items() if doc_id in usable},
            negatives=tuple(doc_id for doc_id in query.negatives if doc_id in usable),
        )
        for query in collection.queries
        if query.text.strip()
    )
    return replace(collection, queries=tuple(query for query in queries if query.positives))
