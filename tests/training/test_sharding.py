"""Stage 1 on a mesh: every shard holds its rows, donated memory is nobody else's, and eight devices compute
what one computes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.jax_processes import run_processes
from helpers.mesh_shapes import covering_meshes, every_mesh
from helpers.sharded_sft_steps import collection_of, config_of
from helpers.tiny_models import byte_tokenizer
from jax.sharding import PartitionSpec

from search_r3_jax.config import MeshConfig
from search_r3_jax.data.pipeline import ROW_FIELDS, PairBatch, TextChunks
from search_r3_jax.hub.load_model import load_model, with_lora
from search_r3_jax.mesh import make_mesh, mesh_from_config
from search_r3_jax.models.layers import LoraParam
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.sft import make_pipeline
from search_r3_jax.training.sft_step import make_step
from search_r3_jax.training.sharding import put_batch
from search_r3_jax.training.state import init_state, state_shardings

PROGRAM = Path(__file__).parents[1] / "helpers" / "sharded_sft_steps.py"


def batch_of() -> PairBatch:
    return make_pipeline(
        config_of("", lora=True), [collection_of()], Prompter(byte_tokenizer(embed_token=True))
    ).batch(0)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_a_padded_batch_is_the_batch_and_padding(count: int) -> None:
    batch = batch_of()
    padded = batch.padded(count)
    for name in ("queries", "documents"):
        whole: TextChunks = getattr(batch, name)
        filled: TextChunks = getattr(padded, name)
        R = whole.ids.shape[1]
        for field in ROW_FIELDS:
            rows = getattr(filled, field)
            assert rows.shape[1] % count == 0
            assert rows.shape[1] - R < count
            np.testing.assert_array_equal(rows[:, :R], getattr(whole, field))
            # Attention and the losses ignore the added rows.
            assert set(np.unique(rows[:, R:])) <= ({-1} if field in ("positions", "segments") else {0})
        np.testing.assert_array_equal(filled.embed_at, whole.embed_at)
        added = filled.reply_at.shape[1] - whole.reply_at.shape[1]
        assert filled.reply_at.shape[1] % count == 0
        assert added < count
        np.testing.assert_array_equal(
            filled.reply_at, np.pad(whole.reply_at, ((0, 0), (0, added)), constant_values=-1)
        )
    for field in PairBatch._fields[2:]:
        np.testing.assert_array_equal(getattr(padded, field), getattr(batch, field))


def test_one_device_needs_no_mesh_and_a_mesh_of_one_changes_nothing() -> None:
    batch = batch_of()
    assert mesh_from_config(MeshConfig()) is None or jax.device_count() > 1
    assert put_batch(batch, None) is batch
    put = put_batch(batch, make_mesh(devices=jax.devices()[:1]))
    for ours, theirs in zip(jax.tree.leaves(put), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_moments_lie_where_their_parameters_lie(tiny_folders: dict[str, Path]) -> None:
    mesh = make_mesh(devices=jax.devices()[:1])
    _, params = nnx.split(load_model(tiny_folders["llama"]).decoder)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, 10))
    )
    shardings = state_shardings(params, optimizer, mesh)
    state = init_state(params, optimizer, shardings)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    adam = shardings.optimizer[1][0]
    assert adam.mu == adam.nu == shardings.params
    assert adam.count.spec == PartitionSpec()
    assert PartitionSpec("tensor", "fsdp") in [sharding.spec for sharding in jax.tree.leaves(adam.mu)]


@pytest.mark.slow
def test_a_donated_state_leaves_the_model_and_the_result_alone(tiny_folders: dict[str, Path]) -> None:
    config = config_of(str(tiny_folders["llama"]), lora=True)
    sft = dataclasses.replace(config.sft, encode_chunk=config.sft.global_batch, kl_weight=0.0)
    config = dataclasses.replace(config, sft=sft)
    model = with_lora(load_model(tiny_folders["llama"]), config.lora, seed=0)
    prompter = Prompter(model.tokenizer)
    batch = make_pipeline(config, [collection_of()], prompter).batch(0)
    graph, params, frozen = nnx.split(model.decoder, LoraParam, ...)
    before = jax.tree.map(np.array, params)
    optimizer = optax.adam(1e-2)
    after = []
    for donate in (False, True):
        state = init_state(params, optimizer, copy=donate)
        new, _ = make_step(graph, prompter, optimizer, config.sft, donate=donate)(state, frozen, batch)
        assert {x.is_deleted() for x in jax.tree.leaves(state.params)} == {donate}
        after.append(jax.tree.map(np.array, new.params))
    jax.tree.map(np.testing.assert_array_equal, *after)
    jax.tree.map(np.testing.assert_array_equal, before, params)


def run(
    folder: Path,
    kind: str,
    meshes: list[dict[str, int]],
    *,
    processes: int,
    devices: int,
    steps: int = 2,
    pairs: int = 32,
    chunk: int = 16,
) -> list[dict[str, Any]]:
    """The reports of all processes, each with so many devices."""
    arguments = [str(folder), kind, json.dumps(meshes), str(steps), str(pairs), str(chunk)]
    return run_processes(PROGRAM, arguments, processes=processes, devices=devices, timeout=1500)


def check(report: dict[str, Any], meshes: list[dict[str, int]], *, devices: int = 8) -> None:
    assert report["devices"] == devices
    # From the second step on, even full fine-tuning has left its reference.
    for name in ("infonce", "triplet", "language", "kl"):
        assert report["scalars"][-1][name] > 1e-4 or (name == "kl" and len(report["scalars"]) == 1), name
    for sizes in meshes:
        found = report[json.dumps(sizes)]
        assert found["scalars"] <= 1e-5
        assert max(found["gradients"]) <= 1e-5
        assert found["params"] <= 1e-5
        assert found["compiled"] == found["shapes"]
        assert found["kernel_share"] == 1 / (sizes.get("fsdp", 1) * sizes.get("tensor", 1))
        assert found["rows_share"] == 1 / (
            sizes.get("slice", 1) * sizes.get("data", 1) * sizes.get("fsdp", 1)
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind", "sizes"),
    [
        # In CI two processes train in `test_restore_elsewhere` and `test_rl_processes`.
        pytest.param("qwen2", "lora", {"fsdp": 2, "tensor": 2}, marks=pytest.mark.exhaustive),
        pytest.param("llama", "full", {"fsdp": 4}, marks=pytest.mark.exhaustive),
    ],
)
def test_two_processes_of_two_devices_compute_what_one_computes(
    tiny_folders: dict[str, Path], family: str, kind: str, sizes: dict[str, int]
) -> None:
    for report in run(tiny_folders[family], kind, [sizes], processes=2, devices=2, pairs=16, chunk=8):
        assert report["processes"] == 2
        check(report, [sizes], devices=4)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind", "part"), [("qwen2", "full", 0), ("llama", "lora", 1)])
@pytest.mark.parametrize(
    "meshes",
    [covering_meshes(), pytest.param(every_mesh(8, most_tensor=2), marks=pytest.mark.exhaustive)],
    ids=len,
)
def test_meshes_compute_what_one_device_computes(
    tiny_folders: dict[str, Path], meshes: list[dict[str, int]], family: str, kind: str, part: int
) -> None:
    # A small batch: of a step, compiling is most of the time.
    meshes = meshes[part::2]
    check(
        run(tiny_folders[family], kind, meshes, processes=1, devices=8, steps=1, pairs=16, chunk=8)[0], meshes
    )
