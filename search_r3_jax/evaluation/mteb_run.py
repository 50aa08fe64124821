"""The command `mteb`: MTEB's tasks, and local collections as tasks; results in MTEB's file format."""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mteb
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.model_meta import ModelMeta
from mteb.results.task_result import TaskResult
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from search_r3_jax.console import TextConsole
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.dataset import ordered_queries_hash
from search_r3_jax.errors import TransientError, UserError
from search_r3_jax.evaluation.mteb_encoder import MtebEncoder
from search_r3_jax.evaluation.report import check_evaluation, open_collection
from search_r3_jax.evaluation.settings import MtebSettings
from search_r3_jax.files import digest_of
from search_r3_jax.hub.reaching import unanswered
from search_r3_jax.outputs import check_output_folder

# Of the hash in a task's name.
HASH_CHARACTERS = 12
# As elsewhere in a table of results.
SCORES = {
    "nDCG@10": "ndcg_at_10",
    "recall@10": "recall_at_10",
    "MRR@10": "mrr_at_10",
    "main score": "main_score",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """The scores of one task on one split of one of its subsets, by MTEB's names."""

    task: str
    split: str
    subset: str
    scores: dict[str, Any]


def collection_task(collection: Collection, *, prompt: str | None = None) -> AbsTaskRetrieval:
    """A collection as a retrieval task of MTEB, named after the collection and a hash of its content.

    MTEB keeps results by the task's name. `prompt` is the task's instruction for queries.
    """
    content = digest_of(
        (
            *(collection.split, collection.corpus_hash(), ordered_queries_hash(collection.queries)),
            *(str(prompt), str(collection.ignore_identical_ids)),
        )
    )
    # MTEB makes its type of such a dictionary at run time.
    prompts: Any = None if prompt is None else {"query": prompt}
    metadata = TaskMetadata(
        name=f"{collection.name}-{content[:HASH_CHARACTERS]}",
        description=f"{collection.name}, from this machine",
        type="Retrieval",
        category="t2t",
        dataset={"path": collection.name, "revision": content},
        eval_splits=[collection.split],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        prompt=prompts,
        is_public=False,
    )
    split = RetrievalSplitData(
        # Titles are joined to the text here, as in training; MTEB's joining needs a title everywhere.
        corpus=Dataset.from_list(
            [{"id": document.doc_id, "text": document.body} for document in collection.documents]
        ),
        queries=Dataset.from_list(
            [{"id": query.query_id, "text": query.body} for query in collection.queries]
        ),
        relevant_docs={query_id: dict(judged) for query_id, judged in collection.qrels().items()},
        top_ranked=None,
    )

    class CollectionTask(AbsTaskRetrieval):
        """MTEB keeps what belongs to the class, and drops everything else once a task is done."""

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            self.dataset = {"default": {collection.split: split}}
            self.data_loaded = True

    CollectionTask.metadata = metadata
    CollectionTask.ignore_identical_ids = collection.ignore_identical_ids
    return CollectionTask()


def run_mteb(settings: MtebSettings) -> list[TaskScores]:
    """Evaluate, print the table, and write MTEB's files under `settings.out`.

    Tasks whose results are there are not run again. Raises UserError before any long work where it can.
    """
    if not settings.tasks and not settings.data:
        raise UserError(
            "mteb: nothing to evaluate; name tasks with --tasks, or data sets of this machine with --data"
        )
    check_output_folder("--out", settings.out)
    if settings.max_tokens is not None and settings.max_tokens < 1:
        raise UserError(f"--max-tokens: {settings.max_tokens} is less than 1; give a positive number")
    evaluations = [settings.evaluation(folder) for folder in settings.data]
    # The limits are the same on all of them, and on tasks of MTEB.
    check_evaluation(settings.evaluation(settings.out))
    notes = TextConsole(sys.stderr)
    collections = [open_collection(each, notes)[0] for each in evaluations]
    named, local = _named_tasks(settings.tasks), [collection_task(each) for each in collections]
    # MTEB's protocol wants a constructor that takes anything; ours names what it takes.
    encoder: Any = MtebEncoder(
        settings.model,
        step=settings.step,
        mode=settings.mode,
        max_tokens=settings.max_tokens,
        max_think_tokens=settings.max_think_tokens,
        instruction_template=settings.instruction_template,
        inference=settings,
    )
    scores_of_tasks: list[TaskScores] = []
    cache = _Results(settings.out)
    for task in (*named, *local):
        result = _evaluate(encoder, task, cache)
        for each in result.task_results:
            for split, subsets in each.scores.items():
                scores_of_tasks += [
                    TaskScores(
                        task=each.task_name, split=split, subset=scores["hf_subset"], scores=dict(scores)
                    )
                    for scores in subsets
                ]
    _show(settings, scores_of_tasks, _titles(settings, collections, local))
    if cache.refused:
        raise UserError(cache.refused)
    return scores_of_tasks


class _Results(mteb.ResultCache):
    """MTEB's files of results; one that the disk refuses goes to another folder, and `refused` says so."""

    refused = ""

    def save_to_cache(self, *arguments: Any, **options: Any) -> None:
        """Save a result."""
        try:
            super().save_to_cache(*arguments, **options)
        except OSError as error:
            reason = f"--out: {self.cache_path}: cannot be written ({error.strerror or error})"
            self.refused = f"{reason}; make room, the results are on standard output only"
            with contextlib.suppress(OSError):
                kept = tempfile.mkdtemp(prefix="search-r3-")
                mteb.ResultCache(kept).save_to_cache(*arguments, **options)
                self.refused = f"{reason}; results are in {kept}"


def _evaluate(encoder: Any, task: Any, cache: mteb.ResultCache) -> Any:
    """The result of a task, from the cache where it is that of the same data.

    Raises TransientError where its data are of a hub that does not answer.
    """
    kept = _kept(cache, task, encoder.mteb_model_meta)
    same = kept is None or kept.dataset_revision == task.metadata.revision
    try:
        # MTEB itself takes complete results of any revision of the data.
        return mteb.evaluate(
            encoder,
            task,
            cache=cache,
            co2_tracker=False,
            overwrite_strategy="only-missing" if same else "always",
        )
    except Exception as error:
        reason = unanswered(error)
        if reason is None:
            raise
        raise TransientError(f"--tasks: {task.metadata.name}: {reason}") from None


def _kept(cache: mteb.ResultCache, task: Any, meta: ModelMeta) -> TaskResult | None:
    """The result of a task that is in the cache; a damaged one is put aside."""
    try:
        return cache.load_task_result(task.metadata.name, meta)
    # What MTEB raises for a file that is not one of its own.
    except (ValueError, LookupError, TypeError, AttributeError):
        file = cache.get_task_result_path(task.metadata.name, meta)
        file.replace(f"{file}.damaged")
        logger.warning("%s: is damaged; put aside as .damaged, the task runs again", file)
        return None


def _titles(
    settings: MtebSettings, collections: Sequence[Collection], tasks: Sequence[AbsTaskRetrieval]
) -> dict[str, str]:
    """Task name → name in the table: that of the collection, where no other one has it."""
    names = [task.metadata.name for task in tasks]
    of_task = {name: collection.name for name, collection in zip(names, collections, strict=True)}
    taken = Counter([*of_task.values(), *settings.tasks])
    return {name: title if taken[title] == 1 else name for name, title in of_task.items()}


def _named_tasks(names: Sequence[str]) -> list[Any]:
    try:
        return [mteb.get_task(name) for name in names]
    except KeyError as error:
        raise UserError(f"--tasks: {' '.join(str(error.args[0]).split())}") from None


def _show(settings: MtebSettings, scores_of_tasks: Sequence[TaskScores], titles: Mapping[str, str]) -> None:
    table = Table(title=Text(f"{settings.model}, {settings.mode}"), title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in SCORES:
        table.add_column(name, justify="right", no_wrap=True)
    for each in scores_of_tasks:
        values = [f"{each.scores[key]:.4f}" if key in each.scores else "" for key in SCORES.values()]
        where = each.split if each.subset == "default" else f"{each.subset}, {each.split}"
        table.add_row(Text(f"{titles.get(each.task, each.task)} ({where})"), *values)
    TextConsole().print(table)
