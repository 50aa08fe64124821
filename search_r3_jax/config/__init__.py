"""Every setting, as frozen keyword-only dataclasses. Imports no jax."""

from search_r3_jax.config.data import DataConfig, FunctionsConfig, TextConfig
from search_r3_jax.config.index import IndexConfig
from search_r3_jax.config.inference import InferenceConfig
from search_r3_jax.config.mesh import MeshConfig
from search_r3_jax.config.model import EMBED_TOKEN, LoraConfig, ModelConfig, RopeScaling
from search_r3_jax.config.ranges import check_ranges
from search_r3_jax.config.reading import config_from_dict, renamed_flags
from search_r3_jax.config.rl import (
    CollapseConfig,
    InfoNceConfig,
    RewardConfig,
    RewardVariant,
    RlConfig,
    SamplerConfig,
)
from search_r3_jax.config.run import RunConfig, Step, TrackerName
from search_r3_jax.config.sft import Direction, OptimizerConfig, SftConfig

__all__ = [
    "EMBED_TOKEN",
    "CollapseConfig",
    "DataConfig",
    "Direction",
    "FunctionsConfig",
    "IndexConfig",
    "InferenceConfig",
    "InfoNceConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RewardVariant",
    "RlConfig",
    "RopeScaling",
    "RunConfig",
    "SamplerConfig",
    "SftConfig",
    "Step",
    "TextConfig",
    "TrackerName",
    "check_ranges",
    "config_from_dict",
    "renamed_flags",
]
