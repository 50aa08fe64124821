"""Folders in every layout, drawn at random: none loads without a word and embeds otherwise than in
`transformers`."""

import shutil
import tempfile
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
    without_prefix,
    write_config,
    write_tensors,
    write_tokenizer,
)
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from search_r3_jax.errors import UserError

Fields = dict[str, Any]
# Not drawn into a field.
LEFT_OUT = object()
few = settings(
    deadline=None,
    max_examples=30,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
many = settings(few, max_examples=2000)


def or_missing(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([LEFT_OUT, *values])


def given_only(drawn: Fields) -> Fields:
    return {name: value for name, value in drawn.items() if value is not LEFT_OUT}


BLOCKS = st.fixed_dictionaries(
    {
        "rope_type": or_missing("default", "linear", "llama3", "yarn", "yarn", None),
        "type": or_missing(LEFT_OUT, "default", "linear", "llama3", "yarn"),
        "rope_theta": or_missing(LEFT_OUT, 50.0, 1e5, None),
        "factor": or_missing(1.0, 4.0, 4.0, 8),
        "original_max_position_embeddings": or_missing(16, 64, None),
        "partial_rotary_factor": or_missing(LEFT_OUT, LEFT_OUT, 1.0, 0.5),
    },
    optional={
        "low_freq_factor": st.sampled_from([1.0, 1.0, 2]),
        "high_freq_factor": st.sampled_from([4.0, 4.0, 3]),
        "attention_factor": st.sampled_from([None, 0.7, 1.2]),
        "beta_fast": st.sampled_from([None, 32, 8.0]),
        "beta_slow": st.sampled_from([None, 1, 2.0]),
        "mscale": st.sampled_from([None, 0.5, 0]),
        "mscale_all_dim": st.sampled_from([None, 0.8]),
        "truncate": st.sampled_from([None, True, False]),
    },
).map(given_only)
USED = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    },
}


def tidy(block: Fields) -> Fields:
    """The block without what its kind does not use: else nearly all are refused."""
    kind = block.get("rope_type", block.get("type", "default"))
    always = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    return {name: value for name, value in block.items() if name in always | USED.get(kind, set())}


@st.composite
def configs(draw: st.DrawFn) -> Fields:
    """Fields of a `config.json`: sizes that fit the weights, and everything else at random."""
    family = draw(st.sampled_from(sorted(CLASSES)))
    block = st.one_of(st.just(LEFT_OUT), st.none(), st.just({}), BLOCKS.map(tidy), BLOCKS.map(tidy))
    random = {
        "head_dim": draw(or_missing(8, 4, 4)) if family != "qwen3" else draw(st.sampled_from([8, 4])),
        "num_key_value_heads": draw(or_missing(1, 2, 4, None)),
        "tie_word_embeddings": draw(or_missing(True, True, False)),
        "rope_theta": draw(or_missing(LEFT_OUT, 50.0, 1e6, None)),
        "rope_parameters": draw(block),
        "rope_scaling": draw(block),
        "original_max_position_embeddings": draw(or_missing(LEFT_OUT, LEFT_OUT, 32, None)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "use_sliding_window": draw(or_missing(LEFT_OUT, False, True, True)),
        "sliding_window": draw(or_missing(LEFT_OUT, None, 6, 40)),
        "max_window_layers": draw(or_missing(LEFT_OUT, 0, 1, 2)),
        "layer_types": draw(
            or_missing(
                *(LEFT_OUT, LEFT_OUT, None, ["full_attention"] * 2, ["attention"] * 2),
                ["full_attention", "sliding_attention"],
            )
        ),
    }
    if family == "llama":
        for name in ("use_sliding_window", "sliding_window", "max_window_layers"):
            if draw(st.booleans()):
                random[name] = LEFT_OUT
    other = {
        "attention_bias": or_missing(LEFT_OUT, False, True),
        "is_causal": or_missing(LEFT_OUT, True, False),
        "hidden_act": or_missing("silu", "swish", "gelu"),
        "use_cache": or_missing(True, False),
        "attention_dropout": or_missing(0.0, 0.3),
        "pretraining_tp": or_missing(1, 2),
        "torch_dtype": or_missing("float16", "bfloat16"),
        "pad_token_id": or_missing(None, 0, 7, -1),
        "auto_map": or_missing({"AutoModel": "x.Y"}),
        "output_hidden_states": or_missing(True),
        "num_experts": or_missing(LEFT_OUT, LEFT_OUT, LEFT_OUT, 0, None),
    }
    # A few of them at a time: any one may be a reason to refuse.
    chosen = draw(st.lists(st.sampled_from(sorted(other)), unique=True, max_size=3))
    random |= {name: draw(other[name]) for name in chosen}
    return given_only(base_fields(family) | random)


LAYOUTS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1),
        "shards": st.sampled_from([1, 1, 2]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "prefix": st.sampled_from([True, True, False]),
        # Shards of other weights and their index, left over beside one file.
        "left_over": st.sampled_from(["none", "none", "index", "index and shards"]),
        "beside": st.sampled_from([None, None, "score.weight", "layers.0.self_attn.rotary_emb.inv_freq"]),
        "rows": st.sampled_from([320, 320, 320, 200]),
    }
)
TOKENIZERS = st.fixed_dictionaries(
    {"kind": st.sampled_from(["bytes", "always", "first", "prepend"]), "begin": st.booleans()}
)


def sizes_of(fields: Fields) -> Fields:
    """The sizes of the weights: fields that are not given have the default of their class."""
    kv_heads = fields.get("num_key_value_heads", 4 if fields["model_type"] == "llama" else 2)
    defaults = {"head_dim": 4, "tie_word_embeddings": False}
    return defaults | fields | {"num_key_value_heads": kv_heads or 4}


def write(folder: Path, fields: Fields, layout: Fields, tokenizer: Fields) -> None:
    write_tokenizer(folder, **tokenizer)
    write_config(folder, fields | {"vocab_size": layout["rows"]})
    sizes = sizes_of(fields) | {"vocab_size": layout["rows"]}
    tensors = random_tensors(sizes, seed=layout["seed"])
    if layout["left_over"] != "none":
        write_tensors(folder, random_tensors(sizes, seed=5), shards=2)
        if layout["left_over"] == "index":
            for file in folder.glob("model-*"):
                file.unlink()
    if not layout["prefix"]:
        tensors = without_prefix(tensors)
    if layout["beside"] is not None:
        tensors[layout["beside"]] = torch.ones(3)
    single = layout["left_over"] != "none"
    write_tensors(folder, tensors, shards=1 if single else layout["shards"], dtype=layout["dtype"])


def check(fields: Fields, layout: Fields, tokenizer: Fields) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        write(folder, fields, layout, tokenizer)
        try:
            ours = our_embeddings(folder)
        except UserError as error:
            event("refused")
            if "\n" in str(error):
                raise AssertionError(f"more than one line: {error}") from error
            return
        event("read")
        np.testing.assert_allclose(ours, torch_embeddings(folder), atol=TOLERANCE)
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
@few
@given(configs(), LAYOUTS, TOKENIZERS)
def test_a_folder_embeds_as_in_transformers_or_is_refused(
    fields: Fields, layout: Fields, tokenizer: Fields
) -> None:
    check(fields, layout, tokenizer)


@pytest.mark.slow
@pytest.mark.exhaustive
@many
@given(configs(), LAYOUTS, TOKENIZERS)
def test_many_folders_embed_as_in_transformers_or_are_refused(
    fields: Fields, layout: Fields, tokenizer: Fields
) -> None:
    check(fields, layout, tokenizer)
