"""Evaluation on the development queries during training: metrics, sample searches, the best step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from search_r3_jax.config import RunConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.distributed.runtime import is_first
from search_r3_jax.evaluation.evaluate import (
    EmbeddedQueries,
    Evaluator,
    ModeResult,
    OnProgress,
    exact_index,
    search_result,
)
from search_r3_jax.evaluation.run_files import shown_text
from search_r3_jax.files import write_json
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.monitor import swap_probe

SHOWN_QUERIES = 3
SHOWN_DOCUMENTS = 3
# Of the first set, to be looked at: enough to see groups, few enough to be written in a moment.
PICTURED_QUERIES = 100
OnEvaluation = Callable[[str, int, int], object]
"""What an evaluation is at, how many of these are done, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Vectors [N,E] of some development queries and of their relevant documents.

    `labels` holds of each its kind and its text.
    """

    labels: list[tuple[str, str]]
    vectors: np.ndarray


class Evaluated(NamedTuple):
    """One evaluation: mean scalars `dev_…` over the sets, a few searches to read, and vectors to look at."""

    scalars: dict[str, float]
    samples: list[dict[str, Any]]
    embeddings: Embeddings


class Development:
    """Evaluates parameters on every development collection, directly and (if `reasoned`) with reasoning.

    With `probe` the queries also exchange their reasoning: `dev_swap_gain` is what nDCG@10 loses by that.
    """

    def __init__(
        self,
        config: RunConfig,
        collections: Sequence[Collection],
        graph: nnx.GraphDef[Decoder],
        prompter: Prompter,
        *,
        reasoned: bool,
        probe: bool = False,
        mesh: Mesh | None = None,
    ):
        self._evaluator = Evaluator(graph, prompter, config.text, config.rl.sampler, mesh=mesh)
        self._names = _names(collections)
        self._collections, self._reasoned, self._probe, self._seed = collections, reasoned, probe, config.seed

    def evaluate(
        self,
        state: nnx.State,
        step: int,
        folder: Path,
        on_progress: OnEvaluation = lambda what, done, total: None,
    ) -> Evaluated:
        """Evaluate at `step`; also writes all results to `eval/dev_<step>.json` of the run."""
        results: dict[str, dict[str, Any]] = {}
        sets: dict[str, dict[str, Any]] = {}
        scalars: dict[str, list[float]] = {}
        samples: list[dict[str, Any]] = []
        embeddings: list[Embeddings] = []
        for name_of_set, collection in zip(self._names, self._collections, strict=True):
            progress = _counter(on_progress, f"{name_of_set}: documents", len(collection.documents))
            documents_ne = self._evaluator.documents(state, collection, progress)
            index = exact_index(collection, documents_ne)
            progress = _counter(on_progress, f"{name_of_set}: queries", len(collection.queries))
            direct = self._evaluator.direct_queries(state, collection, progress)
            modes = {"direct": search_result(collection, index, direct)}
            embeddings.append(_embeddings(collection, documents_ne, direct))
            if self._reasoned:
                progress = _counter(on_progress, f"{name_of_set}: reasoned queries", len(collection.queries))
                queries = self._evaluator.reasoned_queries(state, collection, progress)
                modes["reason"] = search_result(collection, index, queries)
                if self._probe and len(collection.queries) > 1:
                    progress = _counter(
                        on_progress, f"{name_of_set}: exchanged reasoning", len(collection.queries)
                    )
                    swapped = self._evaluator.control_queries(
                        state,
                        collection,
                        queries,
                        seed=self._seed,
                        names=["swapped"],
                        on_progress=progress,
                    )
                    shown = _swap(modes["reason"], search_result(collection, index, swapped["swapped"]))
                    for name, value in shown.items():
                        scalars.setdefault(f"dev_{name}", []).append(value)
            results[name_of_set] = {
                mode: result.as_dict() | {"per_query": _per_query(result)} for mode, result in modes.items()
            }
            sets[name_of_set] = {"split": collection.split, "documents": len(collection.documents)}
            for mode, result in modes.items():
                for name, value in result.as_dict().items():
                    scalars.setdefault(f"dev_{mode}_{name}", []).append(value)
                samples += _samples(name_of_set, collection, mode, result)
        if is_first():
            (folder / "eval").mkdir(exist_ok=True)
            content = {"step": step, "sets": sets, "results": results}
            write_json(folder / "eval" / f"dev_{step:06d}.json", content)
        means = {name: float(np.mean(values)) for name, values in scalars.items()}
        return Evaluated(means, samples, embeddings[0])


def _counter(on_progress: OnEvaluation, what: str, total: int) -> OnProgress:
    """Counts what is finished, and reports it; begins by reporting nothing."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        on_progress(what, done, total)

    count(0)
    return count


def _embeddings(collection: Collection, documents_ne: np.ndarray, queries: EmbeddedQueries) -> Embeddings:
    rows = {document.doc_id: row for row, document in enumerate(collection.documents)}
    shown = collection.queries[:PICTURED_QUERIES]
    found = {
        rows[doc_id]: None
        for query in shown
        for doc_id, grade in query.positives.items()
        if grade > 0 and doc_id in rows
    }
    relevant = list(found)[:PICTURED_QUERIES]
    labels = [("query", query.text) for query in shown]
    labels += [("document", collection.documents[row].body) for row in relevant]
    return Embeddings(
        labels=labels, vectors=np.concatenate([queries.vectors[: len(shown)], documents_ne[relevant]])
    )


def _per_query(result: ModeResult) -> dict[str, float]:
    """nDCG@10 of each query, so that two steps can be compared query by query."""
    return {query_id: metrics.ndcg_at_10 for query_id, metrics in result.of_query.items()}


def _swap(unswapped: ModeResult, swapped: ModeResult) -> dict[str, float]:
    unswapped_ndcg, swapped_ndcg = _per_query(unswapped), _per_query(swapped)
    ids = sorted(unswapped_ndcg)
    before, after = ([[ndcg[i]] for i in ids] for ndcg in (unswapped_ndcg, swapped_ndcg))
    return swap_probe(np.array(before), np.array(after))


def _names(collections: Sequence[Collection]) -> list[str]:
    """The collections' names, numbered where several have the same."""
    names = [collection.name for collection in collections]
    taken = {name for name in names if names.count(name) == 1}
    distinct = list[str]()
    for name in names:
        chosen = name
        if names.count(name) > 1:
            # Another set may have a numbered name itself.
            chosen = next(each for n in count(1) if (each := f"{name} {n}") not in taken)
            taken.add(chosen)
        distinct.append(chosen)
    return distinct


def _samples(name: str, collection: Collection, mode: str, result: ModeResult) -> list[dict[str, Any]]:
    """Searches of the first queries, the same ones each time, so that a reader sees them change."""
    shown = []
    best = {
        query.query_id: sorted(result.run[query.query_id].items(), key=lambda pair: -pair[1])[
            :SHOWN_DOCUMENTS
        ]
        for query in collection.queries[:SHOWN_QUERIES]
    }
    found = {doc_id for ranked in best.values() for doc_id, _ in ranked}
    bodies = {each.doc_id: each.body for each in collection.documents if each.doc_id in found}
    for i, query in enumerate(collection.queries[:SHOWN_QUERIES]):
        shown.append(
            {
                "set": name,
                "mode": mode,
                "query": query.text,
                "reasoning": result.thoughts[i] if result.thoughts else "",
                "ndcg@10": result.of_query[query.query_id].ndcg_at_10,
                "top": [
                    {
                        "document": doc_id,
                        "text": shown_text(bodies[doc_id]),
                        "score": score,
                        "relevant": doc_id in query.positives,
                    }
                    for doc_id, score in best[query.query_id]
                ],
            }
        )
    return shown
