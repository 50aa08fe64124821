"""Stage 1 on a tiny model, as several test files run it."""

import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx

from search_r3_jax.config import LoraConfig, OptimizerConfig, RunConfig, SamplerConfig, SftConfig, TextConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.development import TrainingSet
from search_r3_jax.hub.load_model import LoadedModel, load_model, with_lora
from search_r3_jax.training.sft import OnStep, train_sft


def config_of(folder: Path, steps: int) -> RunConfig:
    return RunConfig(
        model=str(folder),
        compute_dtype="float32",
        remat="dots",
        text=TextConfig(max_query_tokens=16, max_document_tokens=32),
        lora=LoraConfig(rank=4),
        sft=SftConfig(
            steps=steps,
            global_batch=8,
            reasoned_share=0.25,
            reasoning="key_terms",
            key_terms=3,
            save_every=5,
            optimizer=OptimizerConfig(learning_rate=1e-2),
        ),
    )


def train(
    config: RunConfig,
    run: Path,
    collection: Collection,
    on_step: OnStep = lambda *_: None,
    *,
    dev: Collection | None = None,
) -> Any:
    """The trained parameters of a fresh model, as plain arrays."""
    sets = [TrainingSet(train=collection, dev=dev)]
    return nnx.to_pure_dict(
        train_sft(config, run, sets=sets, model=ready(Path(config.model), config), on_step=on_step)
    )


def ready(folder: Path, config: RunConfig) -> LoadedModel:
    return with_lora(load_model(folder, remat=config.remat), config.lora, seed=config.seed)


def watched(folder: Path, steps: int) -> RunConfig:
    """A config that evaluates every third step and keeps one checkpoint and the best."""
    config = config_of(folder, steps)
    sampler = SamplerConfig(max_think_tokens=4)
    sft = dataclasses.replace(
        config.sft, eval_every=3, save_every=100, keep=1, kl_weight=0.0, triplet_weight=0.0
    )
    return dataclasses.replace(config, sft=sft, rl=dataclasses.replace(config.rl, sampler=sampler))
