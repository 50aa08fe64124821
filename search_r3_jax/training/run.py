"""A run's directory: its config, its metrics, and who may write to it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from transformers import PreTrainedTokenizerBase

from search_r3_jax.config import RunConfig
from search_r3_jax.errors import UserError
from search_r3_jax.files import write_json, write_text
from search_r3_jax.hub.checkpoint import pinned_step


class Run:
    """An open run directory; opening it again with the same config resumes it.

    Raises UserError when the directory holds a run with another config.
    """

    def __init__(self, path: Path, config: RunConfig, *, stage: str, extra: dict[str, Any] | None = None):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        record = {"stage": stage, "config": dataclasses.asdict(config), **(extra or {})}
        file = path / "config.json"
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            changed = _differing_field(before, json.loads(json.dumps(record)))
            if changed:
                raise UserError(f"{file}: {changed}: this run was made with another value; give another folder or remove this one")
        else:
            write_json(file, record)
        self._metrics, self._samples = path / "metrics.jsonl", path / "samples.jsonl"
        self._board: SummaryWriter | None = None

    def start_at(self, step: int) -> None:
        """Forget metrics and samples of steps from `step` on: they will be computed again, and each step must stand once."""
        for file in (self._metrics, self._samples):
            if file.is_file():
                lines = file.read_text(encoding="utf-8").splitlines()
                write_text(file, "".join(line + "\n" for line in lines if _step_of(line) < step))

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Append one step's scalars to `metrics.jsonl` and TensorBoard."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        if self._board is None:
            self._board = SummaryWriter(str(self.path / "tensorboard"))
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def sample(self, record: dict[str, Any]) -> None:
        """Append one search, with its `step`, to `samples.jsonl`."""
        with self._samples.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def save_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer beside the checkpoints, with `<|embed_token|>` in it."""
        if not (self.path / "tokenizer").is_dir():
            tokenizer.save_pretrained(str(self.path / "tokenizer"))

    def close(self) -> None:
        """Flush what is still buffered."""
        if self._board is not None:
            self._board.close()


def start_record(run: Path, config: RunConfig) -> dict[str, Any]:
    """What a run has to record of the model it starts from: `start`, relative to it, where that is a run, and `start_step`.

    The checkpoint is chosen once: a run that goes on keeps to it, whatever the earlier stage has saved since.
    """
    file = run / "config.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    recorded: int | None = before.get("start_step") if config.start_step is None else None
    step = pinned_step(config.model, config.start_step, flag="--start-step") if recorded is None else recorded
    start = {"start": os.path.relpath(config.model, run.resolve())} if step is not None else {}
    return {**start, "start_step": step}


def _step_of(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except ValueError:
        # A line cut off by a kill: it is written again.
        return 1 << 62


def _differing_field(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str | None:
    for key in sorted({*before, *now}):
        if isinstance(before.get(key), dict) and isinstance(now.get(key), dict):
            inner = _differing_field(before[key], now[key], f"{prefix}{key}.")
            if inner:
                return inner
        elif before.get(key) != now.get(key):
            return f"{prefix}{key}"
    return None
