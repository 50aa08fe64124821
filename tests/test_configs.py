"""The experiments: each loads, and its parts fit each other."""

import pytest

from search_r3_jax.configs import config_names, load_config
from search_r3_jax.errors import UserError


@pytest.mark.parametrize("name", config_names())
def test_an_experiment_fits_together(name: str) -> None:
    config = load_config(name)
    sft = config.sft
    assert sft.global_batch % (sft.encode_chunk or sft.global_batch) == 0
    assert (sft.reasoned_share > 0) == (sft.reasoning != "off")
    # At least one text of a chunk is in the reasoned format where a share is asked for.
    assert sft.reasoned_share == 0 or round(sft.reasoned_share * (sft.encode_chunk or sft.global_batch)) >= 1
    assert sft.optimizer.warmup_steps < sft.steps


def test_an_unknown_experiment_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(
        UserError, match=r"--config: nope: no such experiment; there are .*quickstart.*smollm2"
    ):
        load_config("nope")
