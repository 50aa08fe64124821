"""Reasoning without a teacher: the terms of the relevant document with the highest tf·idf."""

from __future__ import annotations

from collections import Counter
from math import log

from search_r3_jax.data.collection import Collection
from search_r3_jax.text.words import split_identifiers


class TfidfReasoning:
    """Lists a document's terms with the highest tf·idf within its collection."""

    def __init__(self, collection: Collection, *, count: int):
        self._count = count
        self._words = [
            Counter(w for w in split_identifiers(d.body) if len(w) > 2 and w.isalpha())
            for d in collection.documents
        ]
        documents_with = Counter(word for words in self._words for word in words)
        self._idf = {word: log((1 + len(self._words)) / (1 + n)) for word, n in documents_with.items()}

    def thought(self, row: int) -> str:
        """The reasoning text for the document in a row, highest tf·idf first; ties in alphabetical order."""
        weights = {word: (1 + log(n)) * self._idf[word] for word, n in self._words[row].items()}
        best = sorted(weights, key=lambda word: (-weights[word], word))[: self._count]
        return "Key terms: " + ", ".join(best) + "."
