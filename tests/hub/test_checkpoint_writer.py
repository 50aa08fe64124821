"""Checkpoints: what was written comes back, damage is noticed and got around, errors come up, and what is
needed is kept."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.failing_disk import DISK_FULL

from search_r3_jax.errors import TransientError, UserError
from search_r3_jax.files import write_json
from search_r3_jax.hub import checkpoint_writer
from search_r3_jax.hub.checkpoint_integrity import CHECKSUMS, verify_checkpoint
from search_r3_jax.hub.checkpoint_reader import (
    checkpoint_folder,
    checkpoint_steps,
    read_checkpoint,
)
from search_r3_jax.hub.checkpoint_writer import CheckpointWriter, latest_valid_checkpoint
from search_r3_jax.hub.snapshot_reader import pin_snapshots


def params_of(step: int) -> Any:
    generator = np.random.default_rng(step)
    return nnx.State(
        {
            "w": nnx.Param(jnp.asarray(generator.normal(size=(40, 30)), jnp.float32)),
            "b": nnx.Param(jnp.full(3, float(step))),
        }
    )


def save(run: Path, *steps: int, **settings: Any) -> None:
    writer = CheckpointWriter(run, **{"keep": 9, **settings})
    for step in steps:
        arrays = {
            "rows": np.arange(step, dtype=np.int32),
            "vectors": np.random.default_rng(step).normal(size=(step, 4)),
        }
        writer.save(
            step, params_of(step), {"count": jnp.asarray(step)}, {"note": f"step {step}"}, arrays=arrays
        )
    writer.close()


def check(run: Path, step: int) -> None:
    """A step holds what was saved, to the last bit."""
    writer = CheckpointWriter(run, keep=9)
    found = writer.restore(
        step, jax.tree.map(jnp.zeros_like, params_of(0)), {"count": jnp.zeros((), jnp.int32)}
    )
    writer.close()
    jax.tree.map(
        np.testing.assert_array_equal, nnx.to_pure_dict(found.params), nnx.to_pure_dict(params_of(step))
    )
    assert int(found.optimizer["count"]) == step
    assert found.meta == {"note": f"step {step}", "score": None}
    assert found.arrays["rows"].dtype == np.int32
    np.testing.assert_array_equal(found.arrays["rows"], np.arange(step))
    np.testing.assert_array_equal(found.arrays["vectors"], np.random.default_rng(step).normal(size=(step, 4)))


def test_what_is_saved_comes_back_arrays_without_elements_too(tmp_path: Path) -> None:
    save(tmp_path, 0, 7)
    check(tmp_path, 0)
    check(tmp_path, 7)
    assert verify_checkpoint(checkpoint_folder(tmp_path) / "7") is None


@pytest.mark.slow
def test_a_newest_checkpoint_cut_off_anywhere_is_put_aside_for_the_one_before(
    tmp_path: Path, log_lines: list[str]
) -> None:
    generator = np.random.default_rng(0)
    cut = set[str]()
    trials = 20
    for trial in range(trials):
        run = tmp_path / str(trial)
        save(run, 3, 6)
        folder = checkpoint_folder(run) / "6"
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
        # Evenly over all of them: the names of Orbax's data files are random, so a seeded choice would not be
        # the same twice.
        file = files[trial * len(files) // trials]
        with file.open("r+b") as opened:
            opened.truncate(int(generator.integers(0, file.stat().st_size)))
        cut.add(file.name)
        log_lines.clear()
        assert latest_valid_checkpoint(run) == 3, file
        assert len(log_lines) == 1
        assert "checkpoint 6 is damaged: " in log_lines[0]
        assert checkpoint_steps(run) == [3]
        check(run, 3)
        # The step can be taken, and saved, again.
        save(run, 6)
        assert latest_valid_checkpoint(run) == 6
        check(run, 6)
    assert len(cut) > 8


def test_other_bytes_a_missing_file_and_a_broken_seal_are_damage(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4)
    folder = checkpoint_folder(tmp_path)
    data = max(
        (file for file in (folder / "4").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert "has other bytes than were written" in str(verify_checkpoint(folder / "4"))
    (folder / "3" / "params" / "_METADATA").unlink()
    assert verify_checkpoint(folder / "3") == "params/_METADATA is missing"
    # Who reads the parameters alone is not stopped by what else is wrong.
    (folder / "2" / "meta" / "metadata").unlink()
    assert verify_checkpoint(folder / "2", "params") is None
    read_checkpoint(tmp_path, 2, params_of(0))
    with pytest.raises(
        UserError,
        match=r"checkpoints/3: is damaged: params/_METADATA is missing; choose another step \(1, 2, 4\)",
    ):
        read_checkpoint(tmp_path, 3, params_of(0))
    (folder / "1" / CHECKSUMS).write_text("{")
    assert "cannot be understood" in str(verify_checkpoint(folder / "1"))
    with pytest.raises(UserError, match="all checkpoints are damaged"):
        latest_valid_checkpoint(tmp_path)


def test_a_full_disk_comes_up_at_the_next_call_and_leaves_the_steps_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, keep=9)

    def full(path: Path, value: Any) -> None:
        raise DISK_FULL

    monkeypatch.setattr("search_r3_jax.hub.checkpoint_integrity.write_json", full)
    writer.save(2, params_of(2), {"count": jnp.asarray(2)}, {})
    with pytest.raises(
        UserError, match=r"step 2: cannot be written \(.*No space left on device.*\); make room"
    ):
        writer.wait()
    monkeypatch.setattr("search_r3_jax.hub.checkpoint_integrity.write_json", write_json)
    writer.close()
    assert latest_valid_checkpoint(tmp_path) == 1
    save(tmp_path, 2)
    check(tmp_path, 2)
    assert [
        path.name
        for path in checkpoint_folder(tmp_path).iterdir()
        if checkpoint_writer.TEMPORARY in path.name
    ] == []


def test_a_share_that_is_away_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path, keep=9)

    def away(path: Path, value: Any) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("search_r3_jax.hub.checkpoint_integrity.write_json", away)
    writer.save(2, params_of(2), {"count": jnp.asarray(2)}, {})
    with pytest.raises(TransientError, match=r"step 2: cannot be written \(.*Stale file handle"):
        writer.wait()
    monkeypatch.setattr("search_r3_jax.hub.checkpoint_integrity.write_json", write_json)
    writer.close()


def test_multiples_pinned_and_the_newest_are_kept(tmp_path: Path) -> None:
    pin_snapshots(tmp_path, "reader", [3, 5])
    save(tmp_path, *range(13), keep=2, keep_every=4)
    assert checkpoint_steps(tmp_path) == [3, 4, 5, 8, 11, 12]
    pin_snapshots(tmp_path, "reader", [])
    save(tmp_path, 13, keep=1, keep_every=0)
    assert checkpoint_steps(tmp_path) == [13]


def test_a_checkpoint_of_another_model_is_one_line(tmp_path: Path) -> None:
    save(tmp_path, 1)
    writer = CheckpointWriter(tmp_path)
    other: Any = nnx.State({"w": nnx.Param(jnp.zeros((2, 2))), "c": nnx.Param(jnp.zeros(3))})
    with pytest.raises(UserError, match="does not fit this run"):
        writer.restore(1, other, {"count": jnp.zeros((), jnp.int32)})
    writer.close()


def test_what_is_written_later_is_what_was_given(tmp_path: Path) -> None:
    """Training goes on, and adds to its record, while a save is under way."""
    meta: dict[str, Any] = {"swaps": [[1, 0]]}
    writer = CheckpointWriter(tmp_path)
    writer.save(1, params_of(1), {"count": jnp.asarray(1)}, meta)
    meta["swaps"].append([2, 1])
    writer.close()
    assert json.loads((checkpoint_folder(tmp_path) / "1" / "meta" / "metadata").read_text())["swaps"] == [
        [1, 0]
    ]
