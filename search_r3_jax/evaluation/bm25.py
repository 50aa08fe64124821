"""The BM25 baseline in Lucene's variant."""

import logging
from collections.abc import Callable, Container, Sequence

import numpy as np

from search_r3_jax.data.collection import Collection, Query
from search_r3_jax.evaluation.metrics import Run, run_from_scores
from search_r3_jax.extras import require
from search_r3_jax.text.words import plain_words, split_identifiers

Words = Callable[[str], list[str]]


class Bm25:
    """A corpus indexed for BM25, without English stop words.

    With `identifiers`, snake_case and camelCase are split and nothing is stemmed, which suits code. Without,
    words of two or more characters are stemmed (Snowball, English), as is usual for prose.
    """

    def __init__(self, collection: Collection, *, k1: float = 0.9, b: float = 0.4, identifiers: bool):
        """Raises UserError when a package is not installed."""
        require("bm25", "quickstart" if identifiers else "eval", *bm25_modules(identifiers=identifiers))
        import bm25s
        from bm25s.stopwords import STOPWORDS_EN

        # bm25s sets its logger to DEBUG when imported.
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self._words = _identifier_words(STOPWORDS_EN) if identifiers else _stemmed_words(STOPWORDS_EN)
        self._doc_ids = [document.doc_id for document in collection.documents]
        documents = [self._words(document.body) for document in collection.documents]
        self._index = None
        if any(documents):
            self._index = bm25s.BM25(method="lucene", k1=k1, b=b)
            self._index.index(documents, show_progress=False)

    def run(self, queries: Sequence[Query], *, k: int = 100) -> Run:
        """The `k` best documents of each query with a score above 0."""
        if self._index is None or not queries:
            return {query.query_id: {} for query in queries}
        words = [self._words(query.text) for query in queries]
        rows, scores = self._index.retrieve(words, k=min(k, len(self._doc_ids)), show_progress=False)
        return run_from_scores(
            [query.query_id for query in queries], self._doc_ids, scores, np.where(scores > 0, rows, -1)
        )


def bm25_modules(*, identifiers: bool) -> tuple[str, ...]:
    """What has to be installed."""
    return ("bm25s",) if identifiers else ("bm25s", "Stemmer")


def bm25_run(
    collection: Collection, *, k1: float = 0.9, b: float = 0.4, k: int = 100, identifiers: bool
) -> Run:
    """Search a collection's corpus for its queries; raises UserError when a package is not installed."""
    return Bm25(collection, k1=k1, b=b, identifiers=identifiers).run(collection.queries, k=k)


def _identifier_words(stopwords: Container[str]) -> Words:
    return lambda text: [word for word in split_identifiers(text) if word not in stopwords]


def _stemmed_words(stopwords: Container[str]) -> Words:
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    return lambda text: stemmer.stemWords(
        [word for word in plain_words(text) if len(word) > 1 and word not in stopwords]
    )
