"""GGUF files against `transformers`, which reads and dequantises them by its own code."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, RopeScalingType
from helpers.tiny_gguf import write_gguf
from helpers.tiny_models import torch_model
from transformers import AutoModelForCausalLM
from transformers.integrations.gguf.dequant import dequantize as torch_dequantize
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from search_r3_jax.config import RopeScaling
from search_r3_jax.errors import UserError
from search_r3_jax.hub.gguf import GgufFile
from search_r3_jax.hub.load_model import load_model, torch_tensors


def whole(file: GgufFile, name: str) -> np.ndarray:
    return file.read(name, tuple(slice(0, size) for size in file.shapes[name]))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_logits_equal_transformers(tmp_path: Path, family: str, kind: str) -> None:
    model = torch_model(family)
    file = write_gguf(tmp_path / "model.gguf", model, kind=kind)
    ours = load_model(file)
    # The config as well: for Qwen3 `transformers` does not read the head's size from the file.
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, config=model.config, dtype=torch.float32
    ).eval()
    ids = np.random.default_rng(0).integers(3, 259, (2, 24)).astype(np.int32)
    hidden, _ = ours.decoder(jnp.asarray(ids), jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32), ids.shape))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids, dtype=torch.long)).logits.numpy()
    assert np.abs(expected).mean() > 0.1
    # The padded row that became the embed token's may differ: it starts at the mean.
    np.testing.assert_allclose(
        np.asarray(ours.decoder.logits(hidden))[..., :260], expected[..., :260], atol=1e-4
    )


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_stored_types_come_back_as_written(tmp_path: Path, kind: str) -> None:
    model = torch_model("llama")
    file = GgufFile(write_gguf(tmp_path / "model.gguf", model, kind=kind))
    step = {
        "F32": 0.0,
        "F16": 2**-11,
        "BF16": 2**-8,
        "Q4_0": 1 / 8,
        "Q4_1": 1 / 15,
        "Q5_0": 1 / 16,
        "Q5_1": 1 / 31,
        "Q8_0": 1 / 127,
    }[kind]
    for name in (
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
    ):
        expected = model.state_dict()[name].numpy()
        found = whole(file, name)
        blocks = np.abs(expected).reshape(expected.shape[0], -1, 32).max(-1, keepdims=True)
        width = np.broadcast_to(blocks, (*blocks.shape[:2], 32)).reshape(expected.shape)
        # Half a step, or a whole one at the rim of an unsymmetric range; Q4_1 and Q5_1 span up to twice the
        # largest value.
        assert np.all(np.abs(found - expected) <= width * step * 1.02)
        assert kind == "F32" or np.abs(found - expected).max() > 0


def half(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value).view(np.float16).astype(np.float64)


def decoded_q4_0(blocks: np.ndarray) -> np.ndarray:
    return half(blocks[:, :2]) * (
        np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float64) - 8
    )


def decoded_q4_1(blocks: np.ndarray) -> np.ndarray:
    return half(blocks[:, :2]) * np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(
        np.float64
    ) + half(blocks[:, 2:4])


def decoded_q8_0(blocks: np.ndarray) -> np.ndarray:
    return half(blocks[:, :2]) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float64)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_random_blocks_dequantise_as_elsewhere(tmp_path: Path, kind: str) -> None:
    """Any bytes are valid blocks once their half-precision scales are finite."""
    stored = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[stored]
    rows, columns = 20, 3 * 256
    data = np.random.default_rng(0).integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    # Where each type keeps its half-precision numbers.
    halves = {
        "Q4_0": [0],
        "Q4_1": [0, 2],
        "Q8_0": [0],
        "Q2_K": [80, 82],
        "Q3_K": [108],
        "Q4_K": [0, 2],
        "Q5_K": [0, 2],
        "Q6_K": [208],
    }[kind]
    for at in halves:
        data[:, at : at + 2] = (
            np.random.default_rng(at)
            .normal(0, 0.01, len(data))
            .astype(np.float16)
            .view(np.uint8)
            .reshape(-1, 2)
        )

    def extra(writer: GGUFWriter) -> None:
        writer.add_tensor("blocks", data.reshape(rows, -1), raw_dtype=stored)

    file = GgufFile(write_gguf(tmp_path / "model.gguf", torch_model("qwen2"), extra=extra))
    assert file.shapes["blocks"] == (rows, columns)
    found = whole(file, "blocks")
    expected = (
        torch_dequantize(torch.from_numpy(data.reshape(rows, -1)), int(stored)).numpy().reshape(rows, columns)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    by_hand: dict[str, Any] = {"Q4_0": decoded_q4_0, "Q4_1": decoded_q4_1, "Q8_0": decoded_q8_0}
    if kind in by_hand:
        np.testing.assert_allclose(found, by_hand[kind](data).reshape(rows, columns), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(file.read("blocks", (slice(3, 9), slice(100, 301))), found[3:9, 100:301])


def test_a_part_of_a_permuted_tensor_is_that_part(tmp_path: Path) -> None:
    model = torch_model("llama")
    file = GgufFile(write_gguf(tmp_path / "model.gguf", model))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        expected = model.state_dict()[name].numpy()
        np.testing.assert_array_equal(whole(file, name), expected)
        np.testing.assert_array_equal(file.read(name, (slice(5, 20), slice(7, 40))), expected[5:20, 7:40])


def test_import_then_names_are_those_of_transformers(tmp_path: Path) -> None:
    model = torch_model("qwen2")
    loaded = load_model(write_gguf(tmp_path / "model.gguf", model))
    assert loaded.embed_id == 260
    expected = model.state_dict()
    for name, tensor in torch_tensors(loaded.decoder):
        kept = tensor[:260] if name in ("model.embed_tokens.weight", "lm_head.weight") else tensor
        np.testing.assert_array_equal(kept, expected.pop(name).numpy()[: len(kept)])
    assert not expected


def llama3_divisors(factor: float, theta: float, head_dim: int) -> np.ndarray:
    """Plain frequencies over those that `transformers` gives a Llama 3.1."""
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = torch_model("llama")
    model.config.rope_parameters = scaling | {"rope_theta": theta, "original_max_position_embeddings": 8192}
    model.config.head_dim = head_dim
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    return (theta ** (-np.arange(0, head_dim, 2) / head_dim) / scaled.double().numpy()).astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_divisors_become_the_scaling_they_come_from(tmp_path: Path, factor: float) -> None:
    model = torch_model("llama")
    theta, head_dim = model.config.rope_parameters["rope_theta"], 16
    divisors = llama3_divisors(factor, theta, head_dim)
    file = GgufFile(write_gguf(tmp_path / "model.gguf", model, tensors={"rope_freqs.weight": divisors}))
    assert file.config.rope_scaling == RopeScaling(kind="llama3", factor=factor, original_positions=8192)
    assert "rope_freqs.weight" not in file.shapes
    changed = divisors.copy()
    changed[2] *= 1.01
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        GgufFile(write_gguf(tmp_path / "other.gguf", model, tensors={"rope_freqs.weight": changed}))


def test_rope_scaling_fields(tmp_path: Path) -> None:
    def linear(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)

    def yarn(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(128)

    model = torch_model("qwen2")
    found = GgufFile(write_gguf(tmp_path / "linear.gguf", model, extra=linear)).config.rope_scaling
    assert found == RopeScaling(kind="linear", factor=2.0)
    found = GgufFile(write_gguf(tmp_path / "yarn.gguf", model, extra=yarn)).config.rope_scaling
    model.config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](model.config, torch.device("cpu"))
    assert found is not None
    assert found.attention_factor == pytest.approx(attention_factor)
    assert replace(found, attention_factor=1.0) == RopeScaling(
        kind="yarn", factor=4.0, original_positions=128
    )


def sliding(writer: GGUFWriter) -> None:
    writer.add_sliding_window(128)


def longrope(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
    writer.add_rope_scaling_factor(2.0)


def not_causal(writer: GGUFWriter) -> None:
    writer.add_causal_attention(False)


def scaled_scores(writer: GGUFWriter) -> None:
    writer.add_attention_scale(0.5)


def ternary(writer: GGUFWriter) -> None:
    writer.add_tensor("odd", np.zeros((4, 66), np.uint8), raw_dtype=GGMLQuantizationType.TQ2_0)


def unknown_tensor(writer: GGUFWriter) -> None:
    writer.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros((4, 64), np.float32))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (sliding, "qwen2.attention.sliding_window: not supported"),
        (longrope, "qwen2.rope.scaling.type: 'longrope' is not supported"),
        (not_causal, "qwen2.attention.causal: False is not supported"),
        (scaled_scores, "qwen2.attention.scale: 0.5 is not supported"),
        (ternary, "odd: storage type 35 is not supported"),
        (unknown_tensor, "blk.0.ffn_gate_inp.weight is unknown"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, extra: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_model(write_gguf(tmp_path / "model.gguf", torch_model("qwen2"), extra=extra))
    assert message in str(caught.value)
    assert str(tmp_path / "model.gguf") in str(caught.value)


@pytest.mark.parametrize("keep", [0, 3, 20, 500, 0.5, 0.999])
def test_a_truncated_file_is_one_line(tmp_path: Path, keep: float) -> None:
    file = write_gguf(tmp_path / "model.gguf", torch_model("llama"))
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=r"model\.gguf: .*download") as caught:
        load_model(file)
    assert "\n" not in str(caught.value)


def test_another_architecture_and_pre_tokenizer_are_refused(tmp_path: Path) -> None:
    model = torch_model("llama")
    with pytest.raises(
        UserError, match=r"tokenizer\.ggml\.pre: 'tekken' is not supported; use the Hugging Face folder"
    ):
        load_model(write_gguf(tmp_path / "pre.gguf", model, pre="tekken"))
    model.config.model_type = "gemma3"
    with pytest.raises(UserError, match=r"general\.architecture: 'gemma3' is not supported"):
        load_model(write_gguf(tmp_path / "model.gguf", model))
