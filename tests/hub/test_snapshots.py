"""Snapshots: an encoder makes the same vectors from them, they come after their checkpoint and never without,
and what nobody needs is deleted."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.failing_disk import DISK_FULL
from helpers.jax_processes import run_processes
from helpers.stage2_run import until
from helpers.tiny_models import word_collection

from search_r3_jax.config import LoraConfig, RunConfig
from search_r3_jax.errors import UserError
from search_r3_jax.hub import checkpoint_integrity, snapshot_writer
from search_r3_jax.hub.checkpoint_reader import checkpoint_folder, checkpoint_steps
from search_r3_jax.hub.checkpoint_writer import CheckpointWriter
from search_r3_jax.hub.load_model import LoadedModel, load_model, with_lora
from search_r3_jax.hub.snapshot_reader import (
    as_snapshot,
    has_snapshot,
    latest_snapshot,
    pin_snapshots,
    read_snapshot,
    snapshot_dtype,
    snapshot_folder,
    snapshot_steps,
)
from search_r3_jax.models.lora import merge_lora, trainable_filter
from search_r3_jax.rollout.encoder import Encoder

PROGRAM = Path(__file__).parents[1] / "helpers" / "sharded_snapshot.py"
FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


def trainable(model: LoadedModel, seed: int = 0) -> nnx.State:
    """A model's trainable parameters, moved: as loaded some are 1 or 0, which no rounding changes."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + 0.02 * generator.normal(size=x.shape).astype(np.float32),
        nnx.state(model.decoder, trainable_filter(model.decoder)),
    )


def small(step: int) -> nnx.State:
    generator = np.random.default_rng(step)
    return nnx.State({"w": nnx.Param(jnp.asarray(generator.normal(size=(8, 4)), jnp.float32))})


def writer_of(run: Path, dtype: jnp.dtype = FLOAT32, **settings: Any) -> CheckpointWriter:
    return CheckpointWriter(run, **{"keep": 9, **settings}, snapshot_dtype=dtype)


def save(run: Path, *steps: int, **settings: Any) -> None:
    writer = writer_of(run, **settings)
    for step in steps:
        writer.save(step, small(step), {"count": jnp.zeros(1)}, {})
    writer.close()


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_equal(ours: nnx.State, theirs: nnx.State) -> None:
    assert [x.dtype for x in jax.tree.leaves(ours)] == [x.dtype for x in jax.tree.leaves(theirs)]
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(ours), nnx.to_pure_dict(theirs))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.slow
def test_documents_get_the_same_vectors_from_half_the_bytes(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    # The compiler for CPU may leave out a rounding to bfloat16 whose result it computes with in float32. It
    # does in one product of this qwen3, whose vectors then differ by 0.006 and are no better for it.
    monkeypatch.setattr(
        "search_r3_jax.rollout.encoder.compiler_options", lambda _: {"xla_allow_excess_precision": False}
    )
    model = load_model(tiny_folders[family], compute_dtype="bfloat16")
    params = trainable(model)
    writer = writer_of(tmp_path, snapshot_dtype(RunConfig(compute_dtype="bfloat16", lora=LoraConfig(rank=0))))
    writer.save(3, params, {"count": jnp.zeros(1)}, {})
    writer.close()
    found = read_snapshot(tmp_path, 3, as_snapshot(params, BFLOAT16))
    assert {x.dtype for x in jax.tree.leaves(found)} == {BFLOAT16}
    encoder = Encoder(nnx.split(model.decoder)[0], model.prompter())
    texts = [document.body for document in word_collection(documents=20, queries=2).documents]
    expected = encoder.encode(params, texts, max_tokens=32)
    np.testing.assert_array_equal(encoder.encode(found, texts, max_tokens=32), expected)
    # Who keeps float32 reads the rounded numbers.
    widened = read_snapshot(tmp_path, 3, params)
    np.testing.assert_array_equal(encoder.encode(widened, texts, max_tokens=32), expected)
    whole = sum(x.size * 4 for x in jax.tree.leaves(params))
    assert 0.3 < bytes_in(snapshot_folder(tmp_path) / "3") / whole < 0.6


@pytest.mark.parametrize(
    ("rank", "compute_dtype"), [(4, "bfloat16"), (4, "float32"), (0, "float32")], ids=str
)
def test_adapters_and_float32_are_kept_to_the_last_bit(
    tiny_folders: dict[str, Path], tmp_path: Path, rank: int, compute_dtype: Any
) -> None:
    config = RunConfig(compute_dtype=compute_dtype, lora=LoraConfig(rank=rank))
    model = with_lora(
        load_model(tiny_folders["qwen2"], compute_dtype=compute_dtype), config.lora, seed=config.seed
    )
    params = trainable(model)
    writer = writer_of(tmp_path, snapshot_dtype(config))
    writer.save(1, params, {"count": jnp.zeros(1)}, {})
    writer.close()
    check_equal(read_snapshot(tmp_path, 1, as_snapshot(params, snapshot_dtype(config))), params)
    nnx.update(model.decoder, read_snapshot(tmp_path, 1, params))
    texts = ["one", "another text"]
    merged = merge_lora(model.decoder)
    vectors = Encoder(nnx.split(merged)[0], model.prompter()).encode(nnx.state(merged), texts, max_tokens=16)
    assert np.isfinite(vectors).all()


def test_a_snapshot_comes_after_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    released = threading.Event()
    write = checkpoint_integrity.write_checksums

    def held(folder: Path) -> None:
        released.wait(30)
        write(folder)

    monkeypatch.setattr("search_r3_jax.hub.checkpoint_writer.write_checksums", held)
    writer = writer_of(tmp_path)
    writer.save(2, small(2), {"count": jnp.zeros(1)}, {})
    # Its files are there, and it is not.
    until(lambda: list(snapshot_folder(tmp_path).glob("2.*/**/*.*")) or None)
    with pytest.raises(AssertionError, match="nothing within"):
        until(lambda: 2 in snapshot_steps(tmp_path) or None, seconds=1)
    assert checkpoint_steps(tmp_path) == [1]
    released.set()
    writer.close()
    assert checkpoint_steps(tmp_path) == [1, 2]
    assert snapshot_steps(tmp_path) == [2]
    assert has_snapshot(tmp_path, 2)


def test_a_checkpoint_that_fails_has_no_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(folder: Path) -> None:
        raise DISK_FULL

    monkeypatch.setattr("search_r3_jax.hub.checkpoint_writer.write_checksums", full)
    writer = writer_of(tmp_path)
    writer.save(2, small(2), {"count": jnp.zeros(1)}, {})
    with pytest.raises(UserError, match=r"checkpoints: step 2: cannot be written \(.*No space left"):
        writer.wait()
    writer.close()
    assert checkpoint_steps(tmp_path) == snapshot_steps(tmp_path) == [1]


def test_a_snapshot_that_fails_is_a_line_and_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patched:

        def full(folder: Path) -> None:
            raise DISK_FULL

        patched.setattr(snapshot_writer, "write_checksums", full)
        writer = writer_of(tmp_path)
        writer.save(2, small(2), {"count": jnp.zeros(1)}, {})
        with pytest.raises(
            UserError, match=r"snapshots: step 2: cannot be written \(.*No space left.*writes it"
        ):
            writer.wait()
        writer.close()
    assert checkpoint_steps(tmp_path) == [1, 2]
    assert snapshot_steps(tmp_path) == [1]
    writer = writer_of(tmp_path)
    writer.save_snapshot(2, small(2))
    writer.close()
    assert snapshot_steps(tmp_path) == [2]
    assert [path.name for path in snapshot_folder(tmp_path).iterdir()] == ["2"]
    check_equal(read_snapshot(tmp_path, 2, small(0)), small(2))


def test_the_newest_and_the_pinned_are_kept(tmp_path: Path) -> None:
    pin_snapshots(tmp_path, "reader", [1, 3])
    save(tmp_path, *range(6), keep=2)
    assert snapshot_steps(tmp_path) == [1, 3, 5]
    # A snapshot is read in the place of its checkpoint.
    assert checkpoint_steps(tmp_path) == [4, 5]
    pin_snapshots(tmp_path, "reader", [3])
    save(tmp_path, 6, keep=2)
    assert snapshot_steps(tmp_path) == [3, 6]


def test_a_pin_that_comes_while_a_snapshot_is_written_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    write = checkpoint_integrity.write_checksums

    def pinning(folder: Path) -> None:
        pin_snapshots(tmp_path, "reader", [1])
        write(folder)

    monkeypatch.setattr("search_r3_jax.hub.checkpoint_writer.write_checksums", pinning)
    save(tmp_path, 2)
    assert snapshot_steps(tmp_path) == [1, 2]


def test_a_step_that_a_resumed_run_has_not_is_deleted(tmp_path: Path) -> None:
    pin_snapshots(tmp_path, "reader", [2, 4])
    save(tmp_path, 2, 4, 6)
    for step in (4, 6):
        (checkpoint_folder(tmp_path) / str(step)).rename(checkpoint_folder(tmp_path) / f"damaged-{step}")
    (snapshot_folder(tmp_path) / "8.orbax-checkpoint-tmp-1").mkdir()
    writer_of(tmp_path).close()
    assert [path.name for path in snapshot_folder(tmp_path).iterdir()] == ["2"]
    (checkpoint_folder(tmp_path) / "2").rename(checkpoint_folder(tmp_path) / "damaged-2")
    writer_of(tmp_path).close()
    assert latest_snapshot(tmp_path) is None


def test_damage_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert has_snapshot(tmp_path, 1)
    assert not has_snapshot(tmp_path, 2)
    with pytest.raises(UserError, match="snapshots: step 2: no such snapshot; the newest is 1"):
        read_snapshot(tmp_path, 2, small(0))
    folder = snapshot_folder(tmp_path) / "1"
    files = [file for file in (folder / "d").rglob("*") if file.is_file()]
    data = max(files, key=lambda file: file.stat().st_size)
    with data.open("r+b") as opened:
        opened.truncate(data.stat().st_size // 2)
    assert not has_snapshot(tmp_path, 1)
    with pytest.raises(UserError, match=r"snapshots/1: is damaged: .* bytes, not "):
        read_snapshot(tmp_path, 1, small(0))
    # Written again over the damaged one.
    writer = writer_of(tmp_path)
    writer.save_snapshot(1, small(1))
    writer.close()
    check_equal(read_snapshot(tmp_path, 1, small(0)), small(1))


def test_a_run_without_snapshots_writes_none(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    writer.save(1, small(1), {"count": jnp.zeros(1)}, {})
    writer.save_snapshot(1, small(1))
    writer.close()
    assert checkpoint_steps(tmp_path) == [1]
    assert not snapshot_folder(tmp_path).exists()


@pytest.mark.slow
def test_two_processes_write_a_shard_each(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    arguments = [str(tiny_folders["qwen2"]), str(tmp_path)]
    for report in run_processes(PROGRAM, arguments, processes=2, devices=2, timeout=240):
        assert report == {"snapshots": [2, 6], "checkpoints": [4, 6], "different": [], "shared": True}
    # What two processes wrote, one reads.
    params = trainable(load_model(tiny_folders["qwen2"], compute_dtype="bfloat16"), seed=6)
    check_equal(read_snapshot(tmp_path, 6, as_snapshot(params, BFLOAT16)), as_snapshot(params, BFLOAT16))
    folders = {path.name for path in (snapshot_folder(tmp_path) / "6").iterdir() if path.is_dir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= folders
