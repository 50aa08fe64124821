"""A stand-in for wandb, which keeps what it is told in memory, by run id."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest


class FakeRun:
    """One run at wandb, over several calls."""

    def __init__(self, settings: dict[str, Any]):
        self.settings, self.step, self.finished = settings, 0, 0
        self.logged: dict[int, dict[str, Any]] = {}

    def log(self, values: dict[str, Any], *, step: int) -> None:
        # Wandb drops what is of an earlier step.
        if step >= self.step:
            self.step = step
            self.logged.setdefault(step, {}).update(values)

    def finish(self) -> None:
        self.finished += 1


def install_fake_wandb(patch: pytest.MonkeyPatch, *, refuses: str = "") -> list[FakeRun]:
    """Put it in the place of wandb; the runs that are made."""
    runs: dict[str, FakeRun] = {}
    opened: list[FakeRun] = []

    def init(**settings: Any) -> FakeRun:
        if refuses:
            raise RuntimeError(refuses)
        assert settings["resume"] == "allow"
        opened.append(runs.setdefault(settings["id"], FakeRun(settings)))
        return opened[-1]

    module = types.ModuleType("wandb")
    module.__dict__.update(init=init, Table=lambda columns, data: (tuple(columns), data))
    patch.setitem(sys.modules, "wandb", module)
    return opened
