"""Loads the data sets and the model of a training run, and logs each."""

from __future__ import annotations

import itertools
import logging

from search_r3_jax.config import RunConfig, TextConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.development import TrainingSet, for_stage_2, load_training_sets
from search_r3_jax.errors import UserError
from search_r3_jax.hub.load_model import LoadedModel, load_model, with_lora
from search_r3_jax.mesh import mesh_from_config
from search_r3_jax.text.prompts import Prompter

# Texts that stand for all when it is told how many are cut.
SAMPLE = 200
logger = logging.getLogger(__name__)


def load_sft_data(config: RunConfig) -> tuple[TrainingSet, ...]:
    """Load the data sets of stage 1; raises UserError where one cannot be read or there is none."""
    sets = load_training_sets(config.data)
    for each in sets:
        logger.info(
            f"{each.train.name}: {len(each.train.queries)} queries of {each.train.split}{_development(each)}"
        )
    return sets


def load_rl_data(config: RunConfig) -> TrainingSet:
    """Load the data set of stage 2, its documents left on disk.

    Raises UserError unless there is exactly one.
    """
    if len(config.data.sets) != 1:
        raise UserError(
            f"data.sets: {len(config.data.sets)} data sets: stage 2 searches one corpus; name one"
        )
    data = for_stage_2(load_training_sets(config.data, stored=True)[0], config.data)
    queries, documents = len(data.train.queries), len(data.train.documents)
    logger.info(f"{data.train.name}: {queries} queries over {documents} documents{_development(data)}")
    return data


def load_training_model(config: RunConfig, *, step: int | None = None) -> LoadedModel:
    """Load the model to train, with adapters, on the config's mesh.

    `step` selects the checkpoint where `config.model` is a run.
    """
    logger.info(f"loading {config.model}" + ("" if step is None else f", step {step}"))
    model = load_model(
        config.model,
        step=step,
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        attention=config.attention,
        mesh=mesh_from_config(config.mesh),
    )
    return with_lora(model, config.lora, seed=config.seed)


def log_cut_texts(prompter: Prompter, text: TextConfig, collection: Collection) -> None:
    """Log which share of the first queries and documents is longer than what training reads of a text."""
    queries = [query.body for query in itertools.islice(collection.queries, SAMPLE)]
    documents = [document.body for document in itertools.islice(collection.documents, SAMPLE)]
    for what, setting, texts, most in (
        ("queries", "text.max_query_tokens", queries, text.max_query_tokens),
        ("documents", "text.max_document_tokens", documents, text.max_document_tokens),
    ):
        if cut := sum(len(ids) > most for ids in prompter.text_ids(texts, most + 1)):
            logger.info(
                f"{collection.name}: {cut / len(texts):.0%} of the {what} are longer than {setting} {most}; "
                "the rest of each is not read"
            )


def _development(data: TrainingSet) -> str:
    if data.dev is None:
        return ""
    return f"; {len(data.dev.queries)} of {data.dev.split} over {len(data.dev.documents)} to watch"
