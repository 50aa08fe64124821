"""Settings of each stage as its command shows them: those of the other stage are hidden."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from search_r3_jax.config import (
    DataConfig,
    FunctionsConfig,
    IndexConfig,
    RlConfig,
    RunConfig,
    SftConfig,
)


@dataclass(frozen=True, kw_only=True)
class SftData(DataConfig):
    """Which data sets to train on and to evaluate on during training."""

    rl_queries: Annotated[int, tyro.conf.Suppress] = 0
    rl_documents: Annotated[int, tyro.conf.Suppress] = 0
    functions: Annotated[FunctionsConfig, tyro.conf.Suppress] = field(default_factory=FunctionsConfig)


@dataclass(frozen=True, kw_only=True)
class SftSettings(RunConfig):
    """Settings of stage 1."""

    data: SftData = field(default_factory=SftData)
    rl: Annotated[RlConfig, tyro.conf.Suppress] = field(default_factory=RlConfig)
    index: Annotated[IndexConfig, tyro.conf.Suppress] = field(default_factory=IndexConfig)


@dataclass(frozen=True, kw_only=True)
class RlData(DataConfig):
    """Which data set to train on and to evaluate on during training."""

    functions: Annotated[FunctionsConfig, tyro.conf.Suppress] = field(default_factory=FunctionsConfig)


@dataclass(frozen=True, kw_only=True)
class RlSettings(RunConfig):
    """Settings of stage 2."""

    data: RlData = field(default_factory=RlData)
    sft: Annotated[SftConfig, tyro.conf.Suppress] = field(default_factory=SftConfig)


def sft_settings(config: RunConfig) -> SftSettings:
    """A config as `sft` shows it."""
    return SftSettings(**{**_fields(config), "data": SftData(**_fields(config.data))})


def rl_settings(config: RunConfig) -> RlSettings:
    """A config as `rl` shows it."""
    return RlSettings(**{**_fields(config), "data": RlData(**_fields(config.data))})


def run_config(settings: RunConfig) -> RunConfig:
    """The config that a command was given."""
    return RunConfig(**{**_fields(settings), "data": DataConfig(**_fields(settings.data))})


def _fields(config: Any) -> dict[str, Any]:
    return {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
