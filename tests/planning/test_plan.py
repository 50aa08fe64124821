"""Plans of a small decoder on a small slice: memory against a count by hand, exchanges against the least that
sharding costs."""

import dataclasses
import json
from typing import Any, NamedTuple

import pytest

from search_r3_jax.chips import CHIPS
from search_r3_jax.config import (
    InfoNceConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    RlConfig,
    RunConfig,
    SamplerConfig,
    SftConfig,
    TextConfig,
)
from search_r3_jax.errors import UserError
from search_r3_jax.planning import models, search
from search_r3_jax.planning.plan import make_plan, open_slice
from search_r3_jax.planning.report import print_meshes, print_plan
from search_r3_jax.planning.search import largest_chunk, sensible_meshes, try_meshes

pytest.importorskip("libtpu", reason="the TPU compiler has no wheel for this system")

D, F, L, V = 1024, 2816, 4, 32_000
SMALL = ModelConfig(
    family="qwen2",
    vocab_size=V,
    hidden_size=D,
    feed_forward=F,
    layers=L,
    heads=8,
    kv_heads=4,
    head_dim=128,
    rope_theta=1e6,
    norm_eps=1e-6,
    max_positions=4096,
    qkv_bias=True,
    tied_embeddings=False,
)
# Matrices are shared out: q, k, v, o, gate, up, down of each layer, embedding and head. Vectors are
# everywhere: biases of q, k and v, two norms a layer, the last norm.
MATRICES = L * (2 * D * D + 2 * D * 512 + 3 * D * F) + 2 * V * D
VECTORS = L * (D + 2 * 512 + 2 * D) + D
CONFIG = RunConfig(
    model="small",
    attention="splash",
    text=TextConfig(max_query_tokens=32, max_document_tokens=96, max_thought_tokens=24),
    lora=LoraConfig(rank=0),
    sft=SftConfig(global_batch=64, kl_weight=0.0, reasoned_share=0.125, reasoning="key_terms", negatives=1),
    rl=RlConfig(
        global_queries=16,
        group_size=8,
        micro_queries=8,
        beta=0.0,
        infonce=InfoNceConfig(train_documents=True),
        sampler=SamplerConfig(max_think_tokens=24),
    ),
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.PUBLISHED, "small", SMALL)


@pytest.mark.slow
def test_an_update_of_stage_1() -> None:
    plan = make_plan(CONFIG, "sft", open_slice("v5e:4x4"))
    assert plan.fits
    assert plan.chips == 16
    # Float32 parameters and two moments; the optimiser has two counters. The compiler may pad, by little.
    by_hand = 12 * (MATRICES / 16 + VECTORS)
    assert plan.counted_bytes - by_hand == pytest.approx(8, abs=4)
    assert plan.arguments_bytes == pytest.approx(by_hand, rel=0.02)
    assert plan.fsdp_bound_bytes == pytest.approx(3 * 2 * (MATRICES + VECTORS) * 15 / 16)
    assert plan.collective_ratio is not None
    assert plan.collective_ratio <= 1.1
    # The layers' matrices, at least, are gathered twice and their gradients scattered.
    assert plan.collective_bytes["fsdp"] > 3 * 2 * (MATRICES - 2 * V * D) * 15 / 16
    # Layers are computed once more in the backward pass.
    assert plan.executed_flops - plan.attention_flops > plan.model_flops
    assert set(plan.collective_bytes) == {"fsdp"}


# The committed plans of adapters are counted by hand in `test_committed`.
@pytest.mark.slow
@pytest.mark.exhaustive
def test_adapters_and_a_chunked_batch() -> None:
    config = dataclasses.replace(
        CONFIG, lora=LoraConfig(rank=8), sft=dataclasses.replace(CONFIG.sft, encode_chunk=32, kl_weight=0.1)
    )
    plan = make_plan(config, "sft", open_slice("v5e:2x2"))
    assert plan.fits
    # Of rank 8: what has D is shared out by four, the other factors and the embed token's two rows are
    # everywhere.
    adapters = L * 8 * (7 * D / 4 + (D + 2 * 512 + 2 * F) + (D + F)) + 2 * D
    assert plan.hbm["optimizer"] - 8 * adapters == pytest.approx(8, abs=4)


@pytest.mark.slow
# A rollout is compiled in `test_committed`, too, and held against what is kept.
@pytest.mark.parametrize("stage", ["rl", pytest.param("decode", marks=pytest.mark.exhaustive)])
def test_stage_2(stage: str) -> None:
    plan = make_plan(CONFIG, "rl" if stage == "rl" else "decode", open_slice("v6e:2x2"))
    assert plan.fits
    # Replies, and in an update each of two micro-batches encodes the documents of all queries.
    assert plan.tokens >= 16 * 8 * 24 + (2 * 16 * 96 if stage == "rl" else 0)
    assert plan.executed_flops >= plan.model_flops


@pytest.mark.slow
def test_a_batch_of_the_corpus_and_what_is_said_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(CONFIG, "encode", open_slice("v5p-8"))
    assert (plan.topology, plan.chips) == ("v5p:2x2x1", 4)
    assert plan.binds in plan.seconds
    assert plan.tokens_per_second == pytest.approx(plan.tokens / max(plan.seconds.values()))
    # Gathered once a batch; the rest is looking up embeddings, a larger part of so small a model.
    assert plan.collective_ratio is not None
    assert 1.0 <= plan.collective_ratio <= 1.25
    print_plan(plan, as_json=False)
    said = capsys.readouterr().out
    assert "encode of small on v5p:2x2x1: 4 chips, fsdp 4" in said
    assert CHIPS["v5p"].source in said
    print_plan(plan, as_json=True)
    assert json.loads(capsys.readouterr().out) == dataclasses.asdict(plan)


def test_too_much_is_said_in_a_line() -> None:
    config = dataclasses.replace(CONFIG, model="Qwen/Qwen3-8B", mesh=MeshConfig(data=4, fsdp=1))
    with pytest.raises(UserError, match=r"encode on v5e:2x2: needs [\d.]+ GiB of 15\.75 GiB a chip"):
        make_plan(config, "encode", open_slice("v5e:2x2"))


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5p-12", r"--topology: v5p-12: no such slice; there are v5p-8, v5p-16, .*v5p:2x2x4"),
        ("v7x:2x2", r"--topology: v7x:2x2: give a shape, such as v5e:4x4"),
        ("v5e:3x5", r"--topology: v5e:3x5: the TPU compiler knows no such slice"),
    ],
)
def test_a_slice_that_is_none_is_named(topology: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_slice(topology)


def test_meshes_that_make_sense_divide_the_model() -> None:
    meshes = sensible_meshes(CONFIG, open_slice("v5e:4x4"))
    assert MeshConfig(fsdp=16) in meshes
    assert {mesh.tensor for mesh in meshes} == {1, 2, 4}
    assert all(mesh.data * mesh.fsdp * mesh.tensor == 16 for mesh in meshes)


@pytest.mark.slow
def test_meshes_are_tried_and_the_fastest_comes_first(
    capsys: pytest.CaptureFixture[str], log_lines: list[str]
) -> None:
    tried = try_meshes(CONFIG, "encode", open_slice("v5e:2x2"))
    told = [line for line in log_lines if line.endswith(" tokens/s at most")]
    assert len(told) == len(tried) == len(sensible_meshes(CONFIG, open_slice("v5e:2x2"))) > 3
    rates = [plan.tokens_per_second for _, plan in tried if plan is not None]
    assert rates == sorted(rates, reverse=True)
    for mesh, plan in tried:
        assert plan is not None
        assert {axis: plan.mesh[axis] for axis in ("data", "fsdp", "tensor")} == {
            "data": mesh.data,
            "fsdp": mesh.fsdp,
            "tensor": mesh.tensor,
        }
    print_meshes(tried, as_json=False)
    best = next(line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["1"])
    assert best[:4] == [
        str(size) for size in (tried[0][0].slice, tried[0][0].data, tried[0][0].fsdp, tried[0][0].tensor)
    ]


class _Memory(NamedTuple):
    """Of a plan what the search asks for."""

    chunk: int
    fits: bool
    hbm_used: float
    hbm_limit: float


@pytest.mark.parametrize("most", [1, 3, 4, 16, 47, 48])
def test_the_largest_chunk_is_the_largest_divisor_that_fits(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    asked = list[int]()

    def plan_of(config: RunConfig, stage: str, slices: object) -> _Memory:
        asked.append(config.sft.encode_chunk)
        if config.sft.encode_chunk > 2 * most:
            raise UserError("sft on v5e:2x2: needs 99 GiB of 15.75 GiB a chip")
        return _Memory(
            config.sft.encode_chunk,
            config.sft.encode_chunk <= most,
            1.0 * config.sft.encode_chunk,
            1.0 * most,
        )

    monkeypatch.setattr(search, "make_plan", plan_of)
    config = dataclasses.replace(CONFIG, sft=dataclasses.replace(CONFIG.sft, global_batch=48))
    found: Any = largest_chunk(config, "sft", open_slice("v5e:2x2"))
    assert found.chunk == max(size for size in range(1, most + 1) if 48 % size == 0)
    # Every one is some minutes of a compiler.
    assert len(asked) <= 4


def test_where_nothing_fits_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise UserError("sft on v5e:2x2: needs 99 GiB of 15.75 GiB a chip")

    monkeypatch.setattr(search, "make_plan", too_large)
    with pytest.raises(UserError, match=r"not even sft.encode_chunk 1 fits; take more chips, or adapters"):
        largest_chunk(CONFIG, "sft", open_slice("v5e:2x2"))
    with pytest.raises(UserError, match=r"--largest: encode has no chunk to find"):
        largest_chunk(CONFIG, "encode", open_slice("v5e:2x2"))
