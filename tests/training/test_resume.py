"""What ends a run in the middle, and what it goes on with: a full disk, a damaged checkpoint, a changed
config."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.failing_disk import DISK_FULL
from helpers.log_lines import collect_log_lines
from helpers.tiny_models import word_collection

from search_r3_jax import files
from search_r3_jax.config import LoraConfig, OptimizerConfig, RunConfig, SftConfig, TextConfig
from search_r3_jax.data.development import TrainingSet
from search_r3_jax.errors import UserError
from search_r3_jax.hub import checkpoint_integrity
from search_r3_jax.hub.checkpoint_reader import checkpoint_folder, checkpoint_steps
from search_r3_jax.hub.load_model import load_model, with_lora
from search_r3_jax.training import run as run_module
from search_r3_jax.training.sft import train_sft

STEPS = 8


class Runs:
    """Runs of one config on one model and collection."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self._model = folder, model
        self._sets = [TrainingSet(train=word_collection(documents=24, queries=24), dev=None)]
        self.config = RunConfig(
            model=str(model),
            compute_dtype="float32",
            remat="none",
            text=TextConfig(max_query_tokens=16, max_document_tokens=32),
            lora=LoraConfig(rank=4, dropout=0.1),
            sft=SftConfig(
                steps=STEPS,
                global_batch=8,
                save_every=2,
                keep=3,
                kl_weight=0.0,
                optimizer=OptimizerConfig(learning_rate=1e-2),
            ),
        )

    def train(
        self, name: str, on_step: Callable[[int], object] = lambda done: None, **settings: Any
    ) -> tuple[Any, list[str]]:
        """The trained parameters, and what was said."""
        config = settings.pop("config", self.config)
        model = with_lora(load_model(self._model), config.lora, seed=0)
        with collect_log_lines() as said:
            params = train_sft(
                config,
                self.folder / name,
                sets=self._sets,
                model=model,
                on_step=lambda done, *_: on_step(done),
                **settings,
            )
        return jax.tree.map(np.asarray, nnx.to_pure_dict(params)), said

    def losses(self, name: str) -> list[tuple[int, float]]:
        lines = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines]


@pytest.fixture
def runs(tiny_folders: dict[str, Path], tmp_path: Path) -> Runs:
    return Runs(tmp_path, tiny_folders["llama"])


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_a_line_and_the_same_command_goes_on(runs: Runs) -> None:
    whole, _ = runs.train("whole")
    with pytest.MonkeyPatch.context() as patched:

        def fill(done: int) -> None:
            if done == 3:
                # The disk fills after step 2 has been committed, however slow it is, and before step 4.
                wait_for(runs.folder / "full", [2])
                patched.setattr(checkpoint_integrity, "write_json", full)

        with pytest.raises(
            UserError, match=r"checkpoints: step 4: cannot be written \(.*No space left on device"
        ):
            runs.train("full", fill)
    # It came up at the next step, or while the next was saved.
    assert len(runs.losses("full")) in (4, 5, 6)
    assert checkpoint_steps(runs.folder / "full") == [2]

    with pytest.MonkeyPatch.context() as patched:

        def fill_all(done: int) -> None:
            if done == 5:
                patched.setattr(run_module, "append_json_line", full)

        with pytest.raises(
            UserError, match=r"metrics.jsonl: cannot be written \(No space left on device\); make room"
        ):
            runs.train("full", fill_all)
    resumed, said = runs.train("full")
    assert "going on from step 4" in said
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert runs.losses("full") == runs.losses("whole")


def wait_for(run: Path, steps: list[int]) -> None:
    end = time.monotonic() + 60
    while checkpoint_steps(run) != steps:
        assert time.monotonic() < end
        time.sleep(0.01)


def full(*_: Any, **__: Any) -> None:
    raise DISK_FULL


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_got_around(runs: Runs) -> None:
    whole, _ = runs.train("run")
    losses = runs.losses("run")
    newest = checkpoint_folder(runs.folder / "run") / str(STEPS)
    data = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:-7])
    again, said = runs.train("run")
    assert f"checkpoint {STEPS} is damaged: {data.relative_to(newest)} has" in said[0]
    assert "going on from step 6" in said
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    assert runs.losses("run") == losses
    assert checkpoint_steps(runs.folder / "run") == [4, 6, 8]


@pytest.mark.slow
def test_a_changed_config_goes_on_where_that_is_allowed(runs: Runs) -> None:
    def stop(done: int) -> None:
        if done == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        runs.train("run", stop)
    changed = dataclasses.replace(
        runs.config, sft=dataclasses.replace(runs.config.sft, temperature=0.1, save_every=3)
    )
    with pytest.raises(
        UserError,
        match=r"give another --run, or --allow-config-change(?s:.*)sft\.temperature +0\.05 +0\.1",
    ):
        runs.train("run", config=changed)
    _, said = runs.train("run", config=changed, allow_config_change=True)
    assert "going on from step 4" in said
    assert [step for step, _ in runs.losses("run")] == list(range(STEPS))
    assert files.complete_lines(runs.folder / "run" / "metrics.jsonl")
    record = json.loads((runs.folder / "run" / "config.json").read_text())
    assert {(change["field"], change["step"]) for change in record["changes"]} == {
        ("config.sft.temperature", 4),
        ("config.sft.save_every", 4),
    }


@pytest.mark.slow
def test_a_run_that_is_made_longer_is_the_longer_run(runs: Runs) -> None:
    """Where the learning rate is constant, to the last bit; without a flag."""
    optimizer = dataclasses.replace(runs.config.sft.optimizer, schedule="constant")
    configs = [
        dataclasses.replace(
            runs.config, sft=dataclasses.replace(runs.config.sft, steps=steps, optimizer=optimizer)
        )
        for steps in (STEPS, STEPS // 2)
    ]
    whole, _ = runs.train("whole", config=configs[0])
    runs.train("grown", config=configs[1])
    grown, said = runs.train("grown", config=configs[0])
    assert "changed since this run was started, harmless: config.sft.steps was 4, is 8" in said
    jax.tree.map(np.testing.assert_array_equal, whole, grown)
    assert runs.losses("grown") == runs.losses("whole")


@pytest.mark.slow
def test_stage_1_starts_from_the_checkpoint_that_it_was_started_from(runs: Runs) -> None:
    """Which is chosen once: by default the newest at that time."""
    runs.train("first")
    first, chosen = runs.folder / "first", checkpoint_steps(runs.folder / "first")
    assert chosen[-1] == STEPS
    sets = [TrainingSet(train=word_collection(documents=24, queries=24), dev=None)]
    config = dataclasses.replace(
        runs.config, model=str(first), sft=dataclasses.replace(runs.config.sft, steps=2)
    )
    for name, asked, expected in (("newest", None, STEPS), ("named", chosen[0], chosen[0])):
        with collect_log_lines() as said:
            train_sft(dataclasses.replace(config, start_step=asked), runs.folder / name, sets=sets)
        assert f"loading {first}, step {expected}" in said
        assert json.loads((runs.folder / name / "config.json").read_text())["start_step"] == expected
    (checkpoint_folder(first) / str(STEPS)).rename(checkpoint_folder(first) / str(STEPS + 1))
    longer = dataclasses.replace(config, sft=dataclasses.replace(config.sft, save_every=1))
    with pytest.raises(UserError, match=f"step {STEPS}"):
        train_sft(longer, runs.folder / "newest", sets=sets)
    with pytest.raises(UserError, match=r"--start-step: .*: is no run"):
        train_sft(dataclasses.replace(runs.config, start_step=2), runs.folder / "none", sets=sets)
