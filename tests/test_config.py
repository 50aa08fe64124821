"""Configs that were written by older versions are read under present names; what is unknown is refused."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest

from search_r3_jax.config import RunConfig, check_ranges, config_from_dict, renamed_flags
from search_r3_jax.config.ranges import RANGES
from search_r3_jax.config.reading import RENAMED
from search_r3_jax.errors import UserError

# A run of stage 2 as version 0.1.0 wrote it, with every setting that has another name now.
OLDER: dict[str, Any] = {
    "data": {
        "sets": ["a"],
        "source": "python-functions",
        "train_functions": 1,
        "dev_functions": 2,
        "test_functions": 3,
        "test_queries": 4,
    },
    "rl": {
        "steps": 7,
        "snapshot_every": 5,
        "reward": "rank_margin",
        "reward_temperature": 0.3,
        "margin_weight": 0.25,
        "margin_width": 0.75,
        "hard_negatives": 2,
        "floor_gap": 0.2,
        "length_weight": 0.125,
        "free_tokens": 3,
        "infonce_weight": 0.5,
        "infonce_negatives": 6,
        "infonce_alike": 0.9,
        "infonce_train_documents": True,
        "infonce_temperature": 0.07,
        "collapse_steps": 8,
        "collapse_valid": 0.3,
        "collapse_entropy": 0.02,
    },
    "index": {"overlay_max_age": 9, "max_age": 11, "when_old": "stop", "rolling_documents": 13},
}


def test_settings_of_older_runs_are_read_under_their_present_names() -> None:
    config = config_from_dict(RunConfig, OLDER)
    assert config.data.sets == ("a",)
    assert dataclasses.astuple(config.data.functions) == (1, 2, 3, 4)
    assert (config.rl.steps, config.rl.save_every) == (7, 5)
    assert dataclasses.astuple(config.rl.reward) == ("rank_margin", 0.3, 0.25, 0.75, 2, 0.2, 0.125, 3)
    assert dataclasses.astuple(config.rl.infonce) == (0.5, 0.07, 6, 0.9, True)
    assert dataclasses.astuple(config.rl.collapse) == (8, 0.3, 0.02)
    index = config.index
    assert (index.overlay_max_age_steps, index.max_index_age_steps, index.on_stale_index) == (9, 11, "stop")
    assert index.documents_per_step == 13


def test_every_renamed_setting_is_tried_above_and_exists() -> None:
    older = {f"{section}.{name}" for section, values in OLDER.items() for name in values}
    assert set(RENAMED) <= older
    config = RunConfig()
    for path in filter(None, RENAMED.values()):
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part)


def test_a_config_comes_back_from_json_as_it_was() -> None:
    config = config_from_dict(RunConfig, OLDER)
    assert config_from_dict(RunConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert config_from_dict(RunConfig, {}) == RunConfig()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sed": 1}, "sed: no such setting; the nearest is seed"),
        ({"sft": {"global_bath": 3}}, "sft.global_bath: no such setting; the nearest is sft.global_batch"),
        ({"rl": {"reward": {"temprature": 1}}}, "rl.reward.temprature: .* nearest is rl.reward.temperature"),
        ({"rl": {"optimizer": {"lr": 1}}}, "rl.optimizer.lr: no such setting"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from_dict(RunConfig, fields)


def test_flags_of_older_commands_are_taken_under_their_present_names() -> None:
    arguments = [
        "rl",
        "--rl.infonce-alike",
        "0.8",
        "--index.max-age=3",
        "--rl.reward",
        "dcg",
        "--rl.steps",
        "2",
    ]
    present, notes = renamed_flags(arguments)
    assert present == [
        *("rl", "--rl.infonce.near-duplicate-cosine", "0.8", "--index.max-index-age-steps=3"),
        *("--rl.reward.variant", "dcg", "--rl.steps", "2"),
    ]
    assert notes == [
        "--rl.infonce-alike is now --rl.infonce.near-duplicate-cosine",
        "--index.max-age is now --index.max-index-age-steps",
        "--rl.reward is now --rl.reward.variant",
    ]


def numeric_settings(kind: Any, prefix: str = "") -> Iterator[str]:
    """Paths of the settings of a config that hold numbers, by their declared types."""
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from numeric_settings(hint, f"{prefix}{name}.")
        elif {int, float} & {hint, *get_args(hint)}:
            yield f"{prefix}{name}"


def changed(path: str, value: Any) -> RunConfig:
    """The default config with another value of one setting."""
    fields = dataclasses.asdict(RunConfig())
    *sections, name = path.split(".")
    target = fields
    for section in sections:
        target = target[section]
    target[name] = (value,) if isinstance(target[name], tuple) else value
    return config_from_dict(RunConfig, fields)


def test_every_numeric_setting_has_a_range() -> None:
    assert sorted(numeric_settings(RunConfig)) == sorted(RANGES)
    for stage in ("sft", "rl"):
        check_ranges(RunConfig(), stage)


@pytest.mark.parametrize("path", sorted(RANGES))
def test_a_number_out_of_range_is_refused_by_name(path: str) -> None:
    limits = RANGES[path]
    wrong = [math.nan, math.inf, -math.inf, limits.low - 1, limits.high + 1]
    wrong += [limits.low] * limits.low_open + [limits.high] * limits.high_open
    stages = ("rl",) if path.startswith(("rl.", "index.")) else ("sft",)
    for value in wrong:
        for stage in stages:
            with pytest.raises(UserError, match=f"^{path}: {value}: give a "):
                check_ranges(changed(path, value), stage)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rl.sampler.temperature", 0.0),
        ("rl.sampler.max_think_tokens", 0),
        ("rl.sampler.top_k", 1),
        ("rl.group_size", 1),
        ("rl.infonce.temperature", 0),
        ("rl.clip_low", 1.5),
        ("sft.temperature", 0.0),
        # 0 in float32, or so near to it that a gradient overflows.
        ("sft.temperature", 1e-60),
        ("rl.sampler.temperature", 1e-30),
        ("rl.reward.temperature", 1e-9),
        ("lora.alpha", 1e-60),
        ("sft.optimizer.learning_rate", 1e39),
        ("sft.optimizer.learning_rate", -1e-4),
        ("sft.save_every", 0),
    ],
)
def test_settings_that_the_trainer_cannot_follow(path: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(f'{path}: {value}: ')}"):
        check_ranges(changed(path, value), "rl" if path.startswith("rl.") else "sft")


def test_stage_1_needs_a_loss_and_no_settings_of_stage_2() -> None:
    check_ranges(changed("rl.sampler.temperature", 0.0), "sft")
    check_ranges(changed("sft.temperature", 0.0), "rl")
    weights = dict.fromkeys(("infonce_weight", "triplet_weight", "language_weight", "kl_weight"), 0.0)
    config = dataclasses.replace(RunConfig(), sft=dataclasses.replace(RunConfig().sft, **weights))
    with pytest.raises(UserError, match="every loss has weight 0"):
        check_ranges(config, "sft")
