"""Experiments, a Python file each; its docstring says the command, the chips, the time and what to expect."""

from __future__ import annotations

import importlib
import pkgutil

from search_r3_jax.config import RunConfig
from search_r3_jax.errors import UserError


def config_names() -> list[str]:
    """The experiments there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_config(name: str) -> RunConfig:
    """The config of an experiment; raises UserError when there is none of that name."""
    if name not in config_names():
        raise UserError(f"--config: {name}: no such experiment; there are {', '.join(config_names())}")
    return importlib.import_module(f"{__name__}.{name}").config
