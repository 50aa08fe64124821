"""A short run of stage 2 on a tiny model, in this process."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from helpers.tiny_models import word_collection

from search_r3_jax.config import (
    CollapseConfig,
    IndexConfig,
    LoraConfig,
    OptimizerConfig,
    RlConfig,
    RunConfig,
    SamplerConfig,
    TextConfig,
)
from search_r3_jax.data.dataset import build_dataset, load_collection
from search_r3_jax.data.development import TrainingSet
from search_r3_jax.hub.load_model import LoadedModel, load_model, with_lora
from search_r3_jax.training.rl import RlResult, train_rl
from search_r3_jax.training.run import RlRecord

CONFIG = RunConfig(
    compute_dtype="float32",
    remat="none",
    text=TextConfig(max_query_tokens=16, max_document_tokens=32),
    lora=LoraConfig(rank=4),
    rl=RlConfig(
        steps=6,
        global_queries=3,
        group_size=4,
        save_every=2,
        # A tiny random model hardly ever writes the embed token.
        collapse=CollapseConfig(steps=0),
        sampler=SamplerConfig(max_think_tokens=8),
        optimizer=OptimizerConfig(learning_rate=1e-3),
    ),
    index=IndexConfig(candidates=12, refresh_budget=8, overlay_max_age_steps=2),
)


def start_of_run(tmp_path: Path, folder: Path, **rl: Any) -> tuple[RunConfig, TrainingSet, LoadedModel]:
    config = dataclasses.replace(CONFIG, model=str(folder), rl=dataclasses.replace(CONFIG.rl, **rl))
    build_dataset(
        {"train": word_collection(documents=40, queries=20)},
        tmp_path / "data",
        name="words",
        source={"kind": "test"},
    )
    data = TrainingSet(train=load_collection(tmp_path / "data", "train"), dev=None)
    return config, data, with_lora(load_model(folder), config.lora, seed=0)


def run_it(
    config: RunConfig,
    folder: Path,
    data: TrainingSet,
    model: LoadedModel,
    *,
    pause: float = 0.0,
    **named: Any,
) -> RlResult:
    record = RlRecord(data="../data", split="train")
    options: dict[str, Any] = {"on_step": lambda *_: time.sleep(pause)} | named
    return train_rl(config, folder, data=data, model=model, record=record, **options)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]
