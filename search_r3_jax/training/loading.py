"""Loads the data sets and the model of a training run, and logs each."""

from __future__ import annotations

import itertools
import logging
from typing import Literal

from search_r3_jax.config import RunConfig, TextConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.development import TrainingSet, for_stage_2, load_training_sets
from search_r3_jax.errors import UserError
from search_r3_jax.hub.export import max_text_tokens
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


def load_training_model(
    config: RunConfig, *, step: int | None = None, revision: str | None = None
) -> LoadedModel:
    """Load the model to train, with adapters, on the config's mesh.

    `step` selects the checkpoint where `config.model` is a run, `revision` the commit where it is of the hub.
    """
    name = config.model if revision is None else f"{config.model}@{revision}"
    logger.info(f"loading {name}" + ("" if step is None else f", step {step}"))
    model = load_model(
        name,
        step=step,
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        attention=config.attention,
        mesh=mesh_from_config(config.mesh),
    )
    return with_lora(model, config.lora, seed=config.seed)


def check_sizes(config: RunConfig, model: LoadedModel, stage: Literal["sft", "rl"]) -> None:
    """Raise UserError where texts, thoughts or truncated vectors of a stage are larger than the model's."""
    positions, dimension = model.decoder.config.max_positions, model.decoder.config.hidden_size
    room = max_text_tokens(model.prompter(), positions)
    thought, named = {
        "sft": (config.text.max_thought_tokens, "text.max_thought_tokens"),
        "rl": (config.rl.sampler.max_think_tokens, "rl.sampler.max_think_tokens"),
    }[stage]
    text = config.text
    for name, tokens in (
        ("text.max_document_tokens", text.max_document_tokens),
        ("text.max_query_tokens", text.max_query_tokens),
        (f"text.max_query_tokens, {named}", text.max_query_tokens + thought),
    ):
        if tokens > room:
            raise UserError(
                f"{name}: {tokens}: of the model's {positions} positions {room} are left beside the prompt; "
                "give that many or fewer"
            )
    too_many = [size for size in config.sft.matryoshka if size > dimension]
    if stage == "sft" and too_many:
        raise UserError(
            f"sft.matryoshka: {too_many[0]}: the model's vectors have {dimension} numbers; give that many or "
            "fewer"
        )


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
