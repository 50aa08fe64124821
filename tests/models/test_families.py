"""Config files: what is written means the same to `transformers` and when it is read back."""

import pytest
from helpers.tiny_models import VARIANTS, torch_model
from transformers import AutoConfig

from search_r3_jax.models.families import config_to_hf
from search_r3_jax.models.hf_config import config_from_hf


@pytest.mark.parametrize("variant", VARIANTS)
def test_written_config_means_the_same_to_both(variant: str) -> None:
    theirs = torch_model(variant).config
    ours = config_from_hf(theirs.to_dict(), "config.json")
    written = config_to_hf(ours, "float32")
    assert config_from_hf(written, "config.json") == ours
    # Their reading of what we wrote is their own config again, in every field that decides the computation.
    again = AutoConfig.for_model(written.pop("model_type"), **written)
    for field in (
        "hidden_size",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "layer_types",
        "sliding_window",
    ):
        default = theirs.hidden_size // theirs.num_attention_heads if field == "head_dim" else None
        assert (getattr(again, field, None) or default) == (getattr(theirs, field, None) or default), field
    assert (
        again.rope_parameters.items()
        >= {k: v for k, v in theirs.rope_parameters.items() if v is not None}.items()
    )
