"""Hugging Face folders: what is stored comes back in the right place, and what does not fit is one line that
names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.tiny_models import byte_tokenizer, torch_model
from huggingface_hub import constants
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from search_r3_jax.errors import UserError
from search_r3_jax.hub.load_model import load_model, torch_tensors
from search_r3_jax.hub.model_names import resolve

Tensors = dict[str, np.ndarray]
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama to spoil."""
    return Path(shutil.copytree(tiny_folders["llama"], tmp_path / "model"))


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path, count: int = 3) -> dict[str, str]:
    tensors = load_file(folder / WEIGHTS)
    weight_map = {
        name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors"
        for i, name in enumerate(sorted(tensors))
    }
    for file in set(weight_map.values()):
        save_file(
            {name: tensors[name] for name in weight_map if weight_map[name] == file},
            folder / file,
            metadata={"format": "pt"},
        )
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def error_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_sharded_folders_of_every_dtype_come_back_bit_for_bit(
    tiny_folders: dict[str, Path], tmp_path: Path, family: str, dtype: Any
) -> None:
    folder = Path(shutil.copytree(tiny_folders[family], tmp_path / "model"))
    change_tensors(folder, lambda tensors: {name: tensor.astype(dtype) for name, tensor in tensors.items()})
    expected = load_file(folder / WEIGHTS)
    shard(folder)
    found = dict(torch_tensors(load_model(folder).decoder))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, expected[name].astype(np.float32))


def test_tensors_larger_than_a_chunk_come_back_bit_for_bit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search_r3_jax.hub.weights._CHUNK_BYTES", 3000)
    expected = load_file(folder / WEIGHTS)
    for name, tensor in torch_tensors(load_model(folder).decoder):
        np.testing.assert_array_equal(tensor, expected[name])


def test_a_new_row_starts_at_the_mean(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search_r3_jax.hub.weights._CHUNK_BYTES", 3000)
    change_config(folder, vocab_size=259)
    change_tensors(
        folder,
        lambda tensors: tensors | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:259]},
    )
    old = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    model = load_model(folder)
    new = np.asarray(model.decoder.embedding[...])
    assert new.shape == (384, 64)
    np.testing.assert_array_equal(new[:259], old)
    np.testing.assert_allclose(new[model.embed_id], old.astype(np.float64).mean(0), atol=1e-7)
    assert not new[260:].any()


def test_a_padded_row_starts_at_the_mean_once_it_is_the_embed_tokens(folder: Path) -> None:
    byte_tokenizer().save_pretrained(folder)
    old = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    model = load_model(folder)
    new = np.asarray(model.decoder.embedding[...])
    assert (model.embed_id, new.shape) == (259, (320, 64))
    np.testing.assert_allclose(new[259], old.astype(np.float64).mean(0), atol=1e-7)
    others = np.arange(320) != 259
    np.testing.assert_array_equal(new[others], old[others])


def test_all_mismatches_are_named_at_once(folder: Path) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].T.copy()
        return tensors | {"model.layers.2.self_attn.q_proj.bias": np.zeros(64, np.float32)}

    change_tensors(folder, spoil)
    message = error_of(folder)
    assert "model.layers.0.self_attn.q_proj.weight is missing" in message
    assert "model.layers.1.mlp.up_proj.weight is [64, 96], expected [96, 64]" in message
    assert "model.layers.2.self_attn.q_proj.bias is unknown" in message


def test_known_leftovers_are_harmless(folder: Path) -> None:
    before = dict(torch_tensors(load_model(folder).decoder))

    def add(tensors: Tensors) -> Tensors:
        inverse = {
            f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for i in range(3)
        }
        return tensors | inverse | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}

    change_tensors(folder, add)
    model = load_model(folder)
    assert model.decoder.config.tied_embeddings
    assert [name for name, _ in torch_tensors(model.decoder)] == list(before)


def test_either_of_two_tied_tables_may_be_stored(folder: Path) -> None:
    expected = dict(torch_tensors(load_model(folder).decoder))

    def store_the_head_alone(tensors: Tensors) -> Tensors:
        return {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in tensors.items()}

    change_tensors(folder, store_the_head_alone)
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found = dict(torch_tensors(load_model(folder).decoder))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, expected[name])
        np.testing.assert_array_equal(tensor[: len(theirs[name])], theirs[name].numpy())


def test_a_head_that_differs_outweighs_a_tied_config_as_in_transformers(folder: Path) -> None:
    change_tensors(
        folder, lambda tensors: tensors | {"lm_head.weight": 2 * tensors["model.embed_tokens.weight"]}
    )
    model = load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits.numpy()
    hidden, _ = model.decoder(jnp.asarray(ids.numpy(), jnp.int32), jnp.arange(17, dtype=jnp.int32)[None])
    np.testing.assert_allclose(np.asarray(model.decoder.logits(hidden)), expected, atol=1e-4)
    assert not model.decoder.config.tied_embeddings


def test_not_a_number_is_loaded(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors | {"model.norm.weight": np.full(64, np.nan, np.float32)})
    assert np.isnan(np.asarray(load_model(folder).decoder.final_norm.scale[...])).all()


def test_quantised_checkpoints_are_refused(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "config.json: quantization_config: gptq weights are not supported" in error_of(folder)


@pytest.mark.parametrize(("dtype", "name"), [(np.int32, "I32"), (np.float64, "F64"), (np.uint8, "U8")])
def test_other_dtypes_are_refused(folder: Path, dtype: Any, name: str) -> None:
    change_tensors(folder, lambda tensors: tensors | {"model.norm.weight": np.ones(64, dtype)})
    assert f"model.safetensors: model.norm.weight: stored as {name}" in error_of(folder)


def test_eight_bit_floats_are_refused(folder: Path) -> None:
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = load_torch(folder / WEIGHTS)
    save_torch(
        tensors | {"model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)},
        folder / WEIGHTS,
    )
    assert "model.norm.weight: stored as F8_E4M3" in error_of(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_weights_are_refused(folder: Path, keep: float) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert "model.safetensors: not a readable safetensors file" in error_of(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model.safetensors.index.json: model-00002-of-00003.safetensors: missing" in error_of(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    shard(folder)
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors")
    assert "the folder holds this tensor twice" in error_of(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map: missing"),
        ({"weight_map": {}}, "weight_map: missing"),
        ({"weight_map": ["model.safetensors"]}, "weight_map: missing"),
        ({"weight_map": {"a": 3}}, "weight_map: missing"),
        (
            {"weight_map": {"a": "../x.safetensors"}},
            "'../x.safetensors' is not a safetensors file of this folder",
        ),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "is not a safetensors file of this folder"),
        (
            {"weight_map": {"a": "pytorch_model.bin"}},
            "'pytorch_model.bin' is not a safetensors file of this folder",
        ),
        ([], "holds no JSON object"),
    ],
)
def test_a_bad_index_is_refused(folder: Path, index: Any, message: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    shown = error_of(folder)
    assert message in shown
    assert "model.safetensors.index.json" in shown


def test_pickled_and_absent_weights_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "model.safetensors: missing" in error_of(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights are never read" in error_of(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "model_type: 'mamba' is not supported"),
        ({"hidden_size": 32, "head_dim": 16}, "model.embed_tokens.weight is [320, 64], expected [320, 32]"),
        ({"num_hidden_layers": 2}, "model.layers.2.input_layernorm.weight is unknown"),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 10**12}, "layers: 1000000000000"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide the 4 heads"),
        ({"vocab_size": 0}, "vocab_size: 0 is no positive whole number"),
    ],
)
def test_a_config_of_another_model_is_refused(folder: Path, fields: dict[str, Any], message: str) -> None:
    change_config(folder, **fields)
    assert message in error_of(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json: " in error_of(folder)


def test_a_missing_config_or_tokenizer_is_named(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer.json: missing" in error_of(folder)
    (folder / "config.json").unlink()
    assert "config.json: missing" in error_of(folder)


def test_a_path_that_is_not_there_and_an_unknown_id(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        resolve(tmp_path / "nothing")
    with pytest.raises(
        UserError, match="model: nobody/nothing: no such folder, and neither in the local Hugging Face cache"
    ) as caught:
        resolve("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["runs/mine", "here/mine", "./mine", "here/deeper/mine", Path("nobody/it")])
def test_the_hub_is_not_asked_about_a_mistyped_folder(
    name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "search_r3_jax.hub.model_names.snapshot_download", lambda *_, **__: pytest.fail("asked the hub")
    )
    with pytest.raises(UserError, match=f"model: {name}: no such file or folder"):
        resolve(name)


def test_a_step_of_what_is_no_run_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=f"--step: {folder}: is no run, so it has no checkpoints"):
        load_model(folder, step=3)


def test_an_id_in_the_local_cache_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "cache" / "models--some-one--tiny"
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert resolve("some-one/tiny") == cached / "snapshots" / ("0" * 40)
    assert load_model("some-one/tiny").embed_id == 259


def test_the_untied_head_is_read(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    expected = torch_model("qwen2").state_dict()["lm_head.weight"].numpy()
    np.testing.assert_array_equal(
        dict(torch_tensors(load_model(tiny_folders["qwen2"]).decoder))["lm_head.weight"], expected
    )


@pytest.mark.parametrize("shards_left", [True, False])
def test_one_file_goes_before_an_index_that_is_left_over(folder: Path, shards_left: bool) -> None:
    newer = load_file(folder / WEIGHTS)
    change_tensors(folder, lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()})
    files = set(shard(folder).values())
    save_file(newer, folder / WEIGHTS, metadata={"format": "pt"})
    if not shards_left:
        for file in files:
            (folder / file).unlink()
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in torch_tensors(load_model(folder).decoder):
        np.testing.assert_array_equal(tensor, theirs[name].numpy())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_base_model_is_read(
    tiny_folders: dict[str, Path], tmp_path: Path, family: str, log_lines: list[str]
) -> None:
    folder = Path(shutil.copytree(tiny_folders[family], tmp_path / "model"))
    expected = load_file(folder / WEIGHTS)
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    assert "norm.weight" in load_file(folder / WEIGHTS)
    found = dict(torch_tensors(load_model(folder).decoder))
    for name in expected.keys() - {"lm_head.weight"}:
        np.testing.assert_array_equal(found[name], expected[name])
    # The tiny Qwen2 has a head of its own, which is not in the file.
    assert any("lm_head.weight: missing" in line for line in log_lines) == (family == "qwen2")


def test_a_tensor_with_and_without_its_prefix_is_refused(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors | {"norm.weight": np.ones(64, np.float32)})
    assert "the folder holds this tensor twice" in error_of(folder)


def test_tensors_beside_the_decoder_are_left_out_with_a_warning(folder: Path, log_lines: list[str]) -> None:
    expected = dict(torch_tensors(load_model(folder).decoder))
    change_tensors(folder, lambda tensors: tensors | {"score.weight": np.ones((2, 64), np.int32)})
    found = dict(torch_tensors(load_model(folder).decoder))
    assert found.keys() == expected.keys()
    assert any("score.weight: no part of decoder or head" in line for line in log_lines)


def test_an_adapter_in_the_folder_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter_config.json: the folder holds an adapter" in error_of(folder)


def test_a_token_without_a_row_is_refused(folder: Path) -> None:
    change_config(folder, vocab_size=258)
    change_tensors(
        folder,
        lambda tensors: tensors | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:258]},
    )
    assert "has id 258, but the embedding table has 258 rows" in error_of(folder)


def test_fields_of_the_output_do_not_stop_the_tokenizer(folder: Path) -> None:
    change_config(folder, use_return_dict=True)
    assert load_model(folder).embed_id == 259
