"""Loads the data sets and the model of a training run, and logs each."""

from __future__ import annotations

import logging

from search_r3_jax.config import RunConfig
from search_r3_jax.data.development import TrainingSet, for_stage_2, load_training_sets
from search_r3_jax.errors import UserError
from search_r3_jax.hub.load_model import LoadedModel, load_model, with_lora
from search_r3_jax.mesh import mesh_from_config

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


def _development(data: TrainingSet) -> str:
    if data.dev is None:
        return ""
    return f"; {len(data.dev.queries)} of {data.dev.split} over {len(data.dev.documents)} to watch"
