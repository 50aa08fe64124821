"""A run's directory: one trainer at a time, each step once, and a config that changes only as it may."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import word_collection

from search_r3_jax.config import IndexConfig, LoraConfig, MeshConfig, OptimizerConfig, RunConfig, SftConfig
from search_r3_jax.errors import TransientError, UserError
from search_r3_jax.lease import take_lease
from search_r3_jax.training.config_changes import HARMLESS, changes_of
from search_r3_jax.training.run import LOCK, Run, data_version

CONFIG = RunConfig()


def opened(path: Path, config: RunConfig = CONFIG, **settings: Any) -> Run:
    return Run(path, config, stage="sft", **settings)


def sample_of(step: int, query: str) -> dict[str, Any]:
    search = {"set": "words", "mode": "direct", "reasoning": "", "ndcg@10": 0.5, "top": []}
    return {"step": step, "query": query, **search}


def interrupted() -> None:
    raise InterruptedError


def leaves(fields: dict[str, Any], prefix: str = "config") -> Iterator[str]:
    for name, value in fields.items():
        yield from leaves(value, f"{prefix}.{name}") if isinstance(value, dict) else [f"{prefix}.{name}"]


def test_another_trainer_is_refused_until_the_first_has_closed(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    with pytest.raises(UserError, match="another trainer has this run open; stop it first"):
        opened(tmp_path / "run")
    run.close()
    opened(tmp_path / "run").close()


def test_a_trainer_elsewhere_may_be_on_its_way_out(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    other = take_lease(tmp_path / "run" / LOCK, machine="far", renew_seconds=0.1)
    try:
        with pytest.raises(TransientError, match="another trainer has this run open"):
            opened(tmp_path / "run")
    finally:
        other.release()


def test_a_share_that_is_away_passes_and_a_full_disk_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(tmp_path / "run")
    for number, kind in ((errno.ESTALE, TransientError), (errno.ENOSPC, UserError)):
        error = OSError(number, os.strerror(number))
        monkeypatch.setattr("search_r3_jax.training.run.append_json_line", raising(error))
        with pytest.raises(kind, match=r"metrics\.jsonl: cannot be written"):
            run.log(0, {"loss": 1.0})
    run.close()


def raising(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_a_run_keeps_its_kind_of_index(tmp_path: Path) -> None:
    path = tmp_path / "run"
    opened(path).close()
    rolling = dataclasses.replace(CONFIG, index=IndexConfig(source="rolling", kind="device"))
    before = (path / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"index\.source: was snapshots, is rolling: .*give another --run"):
        opened(path, rolling, allow_config_change=True)
    assert (path / "config.json").read_bytes() == before


def test_a_bucket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError,
        match=r"--run: gs:/bucket/run: a run lies in a folder that all its processes see, not in a bucket",
    ):
        opened(Path("gs://bucket/run"))
    assert list(tmp_path.iterdir()) == []


def test_every_step_stands_once_after_any_number_of_restarts(tmp_path: Path) -> None:
    for first in (0, 3, 1, 4, 4):
        run = opened(tmp_path / "run")
        run.start_at(first)
        for step in range(first, first + 4):
            run.sample([sample_of(step, f"{first} ä")])
            run.log(step, {"loss": first + step / 3})
        run.close()
        # Killed within a line.
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 9, "lo')
    run = opened(tmp_path / "run")
    run.start_at(8)
    run.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    starts = [0, 1, 1, 1, 4, 4, 4, 4]
    assert lines == [{"step": step, "loss": first + step / 3} for step, first in enumerate(starts)]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples == [sample_of(step, f"{first} ä") for step, first in enumerate(starts)]


def test_harmless_changes_are_named_and_taken_over(
    tmp_path: Path,
    log_lines: list[str],
) -> None:
    path, said = tmp_path / "run", log_lines
    opened(path).close()
    assert said == []
    changed = dataclasses.replace(
        CONFIG, mesh=MeshConfig(data=2, fsdp=4), sft=SftConfig(save_every=7), remat="none"
    )
    opened(path, changed, on_change=interrupted).close()
    assert len(said) == 1
    for part in (
        "harmless",
        "config.mesh.data was 1, is 2",
        "config.mesh.fsdp was -1, is 4",
        "config.sft.save_every was 100, is 7",
    ):
        assert part in said[0]
    record = json.loads((path / "config.json").read_text())
    assert record["config"] == json.loads(json.dumps(dataclasses.asdict(changed)))
    assert {change["field"] for change in record["changes"]} >= {
        "config.mesh.data",
        "config.sft.save_every",
        "config.remat",
    }
    opened(path, changed).close()
    assert len(said) == 1
    assert json.loads((path / "config.json").read_text()) == record


def test_harmful_changes_are_refused_all_at_once_and_leave_the_record(
    tmp_path: Path, log_lines: list[str]
) -> None:
    path = tmp_path / "run"
    opened(path).close()
    before = (path / "config.json").read_bytes()
    changed = dataclasses.replace(
        CONFIG, seed=1, lora=LoraConfig(rank=8), sft=SftConfig(optimizer=OptimizerConfig(learning_rate=0.5))
    )
    with pytest.raises(UserError) as refused:
        opened(path, changed)
    rows = [row.split() for row in refused.value.table[1:]]
    assert rows == [
        ["lora.rank", "16", "8"],
        ["seed", "0", "1"],
        ["sft.optimizer.learning_rate", "0.0001", "0.5"],
    ]
    assert (path / "config.json").read_bytes() == before
    with pytest.raises(UserError, match=r"data_version +nothing +\{"):
        opened(path, record={"data_version": [{"corpus_hash": "x"}]})
    said = log_lines
    with pytest.raises(InterruptedError):
        opened(path, changed, allow_config_change=True, on_change=interrupted)
    assert (path / "config.json").read_bytes() == before
    said.clear()
    opened(path, changed, allow_config_change=True).close()
    assert "as allowed: config.lora.rank was 16, is 8" in said[0]
    # From here on these are the run's values.
    opened(path, changed).close()


def test_a_setting_that_is_newer_than_the_run_has_its_default(tmp_path: Path) -> None:
    path = tmp_path / "run"
    opened(path).close()
    record = json.loads((path / "config.json").read_text())
    del record["config"]["sft"]["temperature"]
    (path / "config.json").write_text(json.dumps(record))
    opened(path).close()
    with pytest.raises(UserError, match=r"sft\.temperature +0\.05 +0\.1"):
        opened(path, dataclasses.replace(CONFIG, sft=SftConfig(temperature=0.1)))


def test_every_setting_that_is_called_harmless_exists() -> None:
    fields = set(leaves(dataclasses.asdict(CONFIG)))
    for name in HARMLESS:
        recorded = name in ("data", "data_sizes")
        assert recorded or any(field == name or field.startswith(f"{name}.") for field in fields), name


def test_changes_are_found_wherever_they_are() -> None:
    # A field that is missing and one that is None are the same: older runs lack it.
    before, now = {"a": {"b": 1, "c": [1, 2]}, "d": 4}, {"a": {"b": 1, "c": [1, 3]}, "e": None}
    assert [(change.field, change.before, change.now) for change in changes_of(before, now)] == [
        ("a.c", [1, 2], [1, 3]),
        ("d", 4, "nothing"),
    ]


def test_the_version_of_data_is_its_texts_and_judgements_not_its_place() -> None:
    collection = word_collection(documents=10, queries=5)
    version = data_version(collection)
    assert version == data_version(word_collection(documents=10, queries=5))
    first, *others = collection.queries
    judged = dataclasses.replace(first, positives={"d9": 1})
    for changed in (
        dataclasses.replace(collection, queries=(judged, *others)),
        dataclasses.replace(collection, documents=collection.documents[::-1]),
        dataclasses.replace(collection, queries=tuple(others)),
    ):
        assert data_version(changed) != version
