"""No program of a step compiles twice: the second and the third step find those of the first."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.compiles import lowered_programs
from helpers.tiny_models import word_collection

from search_r3_jax.config import (
    CollapseConfig,
    DataConfig,
    IndexConfig,
    LoraConfig,
    OptimizerConfig,
    RlConfig,
    RunConfig,
    SamplerConfig,
    SftConfig,
    TextConfig,
)
from search_r3_jax.data.dataset import build_dataset, load_collection
from search_r3_jax.data.development import TrainingSet
from search_r3_jax.training.rl import train_rl
from search_r3_jax.training.sft import train_sft

CONFIG = RunConfig(
    compute_dtype="float32",
    remat="none",
    text=TextConfig(max_query_tokens=16, max_document_tokens=32, max_thought_tokens=8),
    lora=LoraConfig(rank=4),
    sft=SftConfig(steps=3, global_batch=8, save_every=3, eval_every=0, optimizer=OptimizerConfig()),
    rl=RlConfig(
        steps=3,
        global_queries=3,
        group_size=4,
        save_every=3,
        eval_every=0,
        collapse=CollapseConfig(steps=0),
        sampler=SamplerConfig(max_think_tokens=6),
    ),
    index=IndexConfig(kind="exact", candidates=12, refresh_budget=8, nice=0),
)


@pytest.fixture
def data(tmp_path: Path) -> TrainingSet:
    collection = word_collection(documents=40, queries=20)
    build_dataset({"train": collection}, tmp_path / "data", name="words", source={"kind": "test"})
    return TrainingSet(train=load_collection(tmp_path / "data", "train"), dev=None)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_later_steps_compile_nothing(
    tiny_folders: dict[str, Path], tmp_path: Path, data: TrainingSet, stage: str, rank: int
) -> None:
    config = dataclasses.replace(
        CONFIG,
        model=str(tiny_folders["llama"]),
        lora=LoraConfig(rank=rank),
        data=DataConfig(sets=(str(tmp_path / "data"),)),
    )
    at_end_of_step: list[int] = []
    with lowered_programs() as names:

        def count(done: int, total: int, metrics: dict[str, float]) -> None:
            at_end_of_step.append(len(names))

        run: Callable[[], object] = (
            (lambda: train_sft(config, tmp_path / "run", sets=[data], on_step=count))
            if stage == "sft"
            else (lambda: train_rl(config, tmp_path / "run", data=data, on_step=count))
        )
        run()
    first, *_, last = at_end_of_step
    assert len(at_end_of_step) == 3
    assert first > 0
    assert names[first:last] == []
