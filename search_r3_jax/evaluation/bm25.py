"""The BM25 baseline (Lucene's variant) that a trained embedder has to beat."""

import logging

import numpy as np

from search_r3_jax.data.collection import Collection
from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.metrics import Run, run_from_scores
from search_r3_jax.text.words import plain_words, split_identifiers


def bm25_run(collection: Collection, *, k1: float = 0.9, b: float = 0.4, k: int = 100, identifiers: bool) -> Run:
    """The `k` best documents of each query with a score above 0; raises UserError when bm25s is not installed.

    English stop words are dropped, nothing is stemmed.
    """
    try:
        import bm25s
        from bm25s.stopwords import STOPWORDS_EN
    except ImportError:
        raise UserError("bm25s is not installed; run: pip install 'search_r3_jax[quickstart]'") from None
    # It sets its own logger to DEBUG when imported.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    words = split_identifiers if identifiers else plain_words
    stopwords = frozenset(STOPWORDS_EN)
    documents = [[word for word in words(document.body) if word not in stopwords] for document in collection.documents]
    queries = [[word for word in words(query.text) if word not in stopwords] for query in collection.queries]
    query_ids = [query.query_id for query in collection.queries]
    if not any(documents) or not queries:
        return {query_id: {} for query_id in query_ids}
    index = bm25s.BM25(method="lucene", k1=k1, b=b)
    index.index(documents, show_progress=False)
    rows, scores = index.retrieve(queries, k=min(k, len(documents)), show_progress=False)
    doc_ids = [document.doc_id for document in collection.documents]
    return run_from_scores(query_ids, doc_ids, scores, np.where(scores > 0, rows, -1))
