"""Every field of the config classes of torch `transformers`: read as they read it, or refused.

A value that they do not open at all is refused here too, unless the field has no influence.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.same_as_transformers import (
    CLASSES,
    TOLERANCE,
    base_fields,
    our_embeddings,
    random_tensors,
    torch_embeddings,
    torch_rows,
    write_config,
    write_tensors,
    write_tokenizer,
)
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from search_r3_jax.config import ModelConfig
from search_r3_jax.errors import UserError
from search_r3_jax.hub.load_model import model_config
from search_r3_jax.models.rope_fields import ROPE_FIELDS
from search_r3_jax.models.rotary import inverse_frequencies
from search_r3_jax.text.tokenizer import tokenizer_from_folder

DROPPED = object()
# Read by the base class, by the code of the models, or by older versions, without being declared.
UNDECLARED = (
    *("rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings"),
    *("head_dim", "attention_bias", "mlp_bias", "is_causal", "layer_types", "sliding_window"),
    *("use_sliding_window", "max_window_layers", "attention_chunk_size", "num_kv_shared_layers"),
    *("per_layer_config", "quantization_config", "transformers_weights", "auto_map", "torch_dtype"),
    *("attn_implementation", "_attn_implementation_autoset", "output_attentions", "tie_last_hidden_states"),
    *("num_labels", "torchscript", "is_decoder", "pruned_heads", "temperature", "tokenizer_class"),
    *("_name_or_path", "_commit_hash", "use_return_dict", "model_max_length", "unsloth_fixed"),
)
FEW: tuple[Any, ...] = (None, False, True, 2, "x")
MANY: tuple[Any, ...] = (0, 1, 3, -1, 0.5, 1.0, [], {})
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: tuple[Any, ...] = (
    *(
        LINEAR,
        YARN,
        LLAMA3,
        {"rope_theta": 50.0},
        LINEAR | {"rope_theta": 50.0},
        {"type": "linear", "factor": 2.0},
    ),
    *({"rope_type": "default", "type": "linear", "factor": 2.0}, {"rope_type": None}, {"rope_theta": None}),
    *(YARN | {"beta_fast": None, "truncate": None}, YARN | {"truncate": False}, YARN | {"factor": None}),
    *(
        YARN | {"mscale": 0.7, "mscale_all_dim": 0.3},
        YARN | {"mscale": 0.7},
        YARN | {"attention_factor": 0.8},
    ),
    *(YARN | {"original_max_position_embeddings": None}, LINEAR | {"partial_rotary_factor": 0.5}),
    *(
        {"full_attention": LINEAR},
        {"rope_type": "longrope", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
    ),
)
KINDS = (["full_attention"] * 2, ["sliding_attention"] * 2, ["attention"] * 2, ["chunked_attention"] * 2)
VALUES: dict[str, tuple[Any, ...]] = {
    "rope_parameters": ROPES,
    "rope_scaling": ROPES,
    "rope_theta": (50.0, 50, 1e6),
    "layer_types": (*KINDS, ["full_attention"]),
    "sliding_window": (6,),
    "hidden_act": ("silu", "swish", "gelu", "relu"),
    "dtype": ("bfloat16", "float32"),
    "torch_dtype": ("bfloat16",),
    "num_key_value_heads": (4, 3, 32),
    "num_attention_heads": (8,),
    "head_dim": (4, 16, 7),
    "hidden_size": (18, 32),
    "rms_norm_eps": (1e-6, 0.1),
    "max_position_embeddings": (32, 4096),
    "original_max_position_embeddings": (32,),
    "pad_token_id": (5, 319, 320, -320, -321),
    "vocab_size": (319, 384),
    "id2label": ({"0": "a"},),
    "per_layer_config": ({"0": {"rms_norm_eps": 0.5}},),
    "auto_map": ({"AutoModel": "a.B"},),
    "attention_dropout": (0.1,),
    "attn_implementation": ("eager", "sdpa"),
    "architectures": (["LlamaModel"],),
}
# Beside these, some fields only show in company.
COMPANY: dict[str, dict[str, Any]] = {
    "use_sliding_window": {"sliding_window": 6, "max_window_layers": 1},
    "sliding_window": {"use_sliding_window": True, "max_window_layers": 0},
    "max_window_layers": {"use_sliding_window": True, "sliding_window": 6},
    "layer_types": {"use_sliding_window": True, "sliding_window": 6},
    "original_max_position_embeddings": {"rope_parameters": LLAMA3},
    "max_position_embeddings": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "rope_theta": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "rope_parameters": {"rope_theta": 70.0, "rope_scaling": {}},
    "rope_scaling": {"rope_theta": 70.0, "rope_parameters": {"rope_theta": 90.0, "rope_type": "default"}},
}
# Without influence here, while the classes of `transformers` look at the type of the value.
INERT = {
    *("transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype", "id2label"),
    *("chunk_size_feed_forward", "label2id", "problem_type", "initializer_range", "use_cache", "torch_dtype"),
    *(
        "bos_token_id",
        "eos_token_id",
        "pretraining_tp",
        "attention_dropout",
        "num_labels",
        "output_attentions",
    ),
    *("use_return_dict", "attn_implementation", "auto_map", "tie_last_hidden_states"),
}


@functools.cache
def _folder(family: str, root: Path) -> Path:
    folder = root / family
    folder.mkdir()
    write_tensors(folder, random_tensors(base_fields(family)))
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fields")


_EMBEDDINGS: dict[ModelConfig, np.ndarray] = {}


def our_view(folder: Path) -> np.ndarray | None:
    """Our embeddings, a function of the weights and the `ModelConfig`; None where the folder is refused."""
    try:
        config = model_config(folder)
        tokenizer_from_folder(folder)
        if config not in _EMBEDDINGS:
            _EMBEDDINGS[config] = our_embeddings(folder)
    except UserError:
        return None
    return _EMBEDDINGS[config]


def our_rope(folder: Path) -> np.ndarray | None:
    """Our frequencies [H/2] and the factor of cosines and sines [1]; None where the folder is refused."""
    try:
        config = model_config(folder)
    except UserError:
        return None
    factor = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    return np.append(inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling), factor)


def torch_rope(folder: Path) -> np.ndarray:
    config: Any = AutoConfig.from_pretrained(folder)
    rotary = LlamaRotaryEmbedding(config)
    # One rotation, for they fail late on some values.
    rotary(torch.zeros(1), torch.zeros(1, 1))
    return np.append(rotary.inv_freq.numpy(), rotary.attention_scaling)


def fields_of(family: str) -> list[str]:
    return sorted({field.name for field in dataclasses.fields(CLASSES[family][0])} | set(UNDECLARED))


FIELDS = [(family, name) for family in CLASSES for name in fields_of(family)]


@functools.cache
def _rows(folder: Path) -> list[list[int]]:
    return torch_rows(folder)


def compare(folder: Path, fields: dict[str, Any], name: str, shown: str) -> bool:
    """Whether a config is read, and then as `transformers` reads it."""
    write_config(folder, fields)
    rope = name in ROPE_FIELDS
    mine = our_rope(folder) if rope else our_view(folder)
    if mine is None:
        return False
    try:
        theirs = torch_rope(folder) if rope else torch_embeddings(folder, _rows(folder))
    except Exception as error:
        # A whole number is a number here.
        if name not in INERT and name != "rms_norm_eps":
            raise AssertionError(f"{shown}: read here, while transformers does not open it") from error
        return True
    np.testing.assert_allclose(mine, theirs, rtol=1e-6 if rope else 0, atol=TOLERANCE, err_msg=shown)
    return True


def check(family: str, name: str, values: tuple[Any, ...], root: Path) -> None:
    folder = _folder(family, root)
    refused = []
    for company in [{}] + ([COMPANY[name]] if name in COMPANY else []):
        for value in values:
            fields = base_fields(family) | company | {name: value}
            if value is DROPPED:
                del fields[name]
            if not compare(folder, fields, name, f"{name}={value!r} {company}"):
                refused.append(value)
    if name in INERT:
        assert refused == []


@pytest.mark.parametrize(("family", "name"), FIELDS)
def test_a_field_means_the_same_or_is_refused(family: str, name: str, root: Path) -> None:
    check(family, name, (DROPPED, *FEW, *VALUES.get(name, ())), root)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("family", "name"), FIELDS)
def test_a_field_of_any_value_means_the_same_or_is_refused(family: str, name: str, root: Path) -> None:
    check(family, name, MANY, root)
