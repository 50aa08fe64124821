"""Changed settings: longer training where the schedule allows it, and a table of what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import search_r3_here

from search_r3_jax.config import OptimizerConfig, RlConfig, RunConfig, SftConfig
from search_r3_jax.errors import UserError
from search_r3_jax.training import run as run_module
from search_r3_jax.training.config_changes import Change, change_table
from search_r3_jax.training.run import Run

DATA = {"name": "words", "split": "train", "corpus_hash": "1" * 64, "queries_hash": "2" * 64}


def config_of(stage: str, steps: int, **optimizer: Any) -> RunConfig:
    of_stage: dict[str, Any] = {"steps": steps, "optimizer": OptimizerConfig(**optimizer)}
    return RunConfig(
        sft=SftConfig(**of_stage) if stage == "sft" else SftConfig(),
        rl=RlConfig(**of_stage, inner_epochs=2) if stage == "rl" else RlConfig(),
    )


def open_twice(
    path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, before: RunConfig, now: RunConfig, done: int
) -> None:
    Run(path, before, stage=stage).close()
    monkeypatch.setattr(run_module, "latest_checkpoint", lambda _: done)
    Run(path, now, stage=stage).close()


@pytest.mark.parametrize("stage", ["sft", "rl"])
@pytest.mark.parametrize(
    ("optimizer", "done"),
    [
        ({"schedule": "constant"}, 100),
        ({"schedule": "constant", "warmup_steps": 10}, 100),
        # The decay of the shorter run would have begun at step 80.
        ({"schedule": "wsd"}, 80),
        ({"schedule": "wsd", "warmup_steps": 10}, 60),
        # Nothing is done yet, or nothing but warming up.
        ({"schedule": "cosine"}, 0),
        ({"schedule": "linear", "warmup_steps": 40}, 20),
    ],
)
def test_longer_training_needs_no_flag_where_the_steps_so_far_stay_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_lines: list[str],
    stage: str,
    optimizer: dict[str, Any],
    done: int,
) -> None:
    before, now = (config_of(stage, steps, **optimizer) for steps in (100, 150))
    open_twice(tmp_path / "run", monkeypatch, stage, before, now, done)
    assert log_lines == [
        f"changed since this run was started, harmless: config.{stage}.steps was 100, is 150"
    ]


@pytest.mark.parametrize("stage", ["sft", "rl"])
@pytest.mark.parametrize(
    ("optimizer", "done"),
    [({"schedule": "cosine"}, 5), ({"schedule": "linear", "warmup_steps": 2}, 5), ({"schedule": "wsd"}, 90)],
)
def test_a_decay_that_had_begun_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, optimizer: dict[str, Any], done: int
) -> None:
    before, now = (config_of(stage, steps, **optimizer) for steps in (100, 150))
    with pytest.raises(UserError) as refused:
        open_twice(tmp_path / "run", monkeypatch, stage, before, now, done)
    error = refused.value
    assert error.line.endswith("give another --run, or --allow-config-change to go on with these")
    head, row, explained = error.table
    assert head.split() == ["setting", "this", "run", "asked"]
    assert row.split() == [f"{stage}.steps", "100", "150"]
    assert explained == (
        f"{stage}.steps: the decay of {stage}.optimizer.schedule {optimizer['schedule']} ends at the last "
        f"step, so the {done} steps so far would have had other learning rates"
    )


def test_shorter_training_is_refused_and_the_other_stage_has_no_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = config_of("sft", 100, schedule="constant")
    fewer = config_of("sft", 50, schedule="constant")
    with pytest.raises(UserError, match=r"sft\.steps"):
        open_twice(tmp_path / "run", monkeypatch, "sft", before, fewer, 10)
    other = dataclasses.replace(before, rl=RlConfig(steps=7))
    Run(tmp_path / "run", other, stage="sft").close()


def test_a_table_is_aligned_and_has_no_hashes(tmp_path: Path) -> None:
    path, config = tmp_path / "run", RunConfig()
    Run(path, config, stage="sft", record={"data_version": [DATA]}).close()
    other = dataclasses.replace(config, sft=SftConfig(temperature=0.1, matryoshka=(64, 128)))
    with pytest.raises(UserError) as refused:
        Run(path, other, stage="sft", record={"data_version": [DATA | {"corpus_hash": "3" * 64}]})
    assert refused.value.table == (
        "  setting          this run      asked",
        "  sft.matryoshka   none          64 128",
        "  sft.temperature  0.05          0.1",
        "  data: documents  as they were  other ones",
    )
    with pytest.raises(UserError) as refused:
        Run(path, config, stage="sft", record={"data_version": [DATA, DATA]})
    assert refused.value.table[1] == "  data_version  words (train)  words (train) words (train)"


def test_long_values_are_cut() -> None:
    change = Change(field="prompts.direct.before", before="a " * 200, now=None)
    (_, row) = change_table([change])
    assert row.startswith("  prompts.direct.before  a a a")
    assert len(row) < 90


def test_the_command_shows_the_table_below_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UserError("config.json: other values; give another --run", table=["  setting  this run  asked"])

    monkeypatch.setattr("search_r3_jax.training.sft.train_sft", refuse)
    found = search_r3_here("sft", "--config", "smollm2", "--run", str(tmp_path / "run"))
    assert found.returncode == 2
    assert found.stderr == (
        "search-r3: config.json: other values; give another --run\n  setting  this run  asked\n"
    )
