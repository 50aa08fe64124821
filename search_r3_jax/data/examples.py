"""Queries with their documents, printed for people who check what was built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from search_r3_jax.data.collection import Collection, Query

MAX_CHARACTERS = 160


def example_lines(collections: Mapping[str, Collection], count: int = 2) -> Iterator[str]:
    """Lines that show the first queries as they are embedded, of `train` if there is one."""
    split = "train" if "train" in collections else next(iter(collections))
    collection = collections[split]
    for number, query in enumerate(collection.queries[:count], start=1):
        yield f"example {number} of {split}:"
        yield f"  query     {_shown(query.body)}"
        if query.reasoning:
            yield f"  reasoning {_shown(query.reasoning)}"
        yield from _documents(collection, query)


def _documents(collection: Collection, query: Query) -> Iterator[str]:
    for kind, doc_ids in (("positive", list(query.positives)), ("negative", query.negatives)):
        if doc_ids:
            body = collection.documents[collection.row_of[doc_ids[0]]].body
            relevance = query.positives.get(doc_ids[0], 1)
            notes = [f"relevance {relevance}"] if relevance > 1 else []
            if len(doc_ids) > 1:
                notes.append(f"{len(doc_ids) - 1} more")
            note = f" ({', '.join(notes)})" if notes else ""
            yield f"  {kind}  {_shown(body)}{note}"


def _shown(text: str) -> str:
    # Quoted: spaces and line ends are part of what the model sees.
    return repr(text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + "…")
