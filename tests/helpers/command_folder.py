"""Runs of both stages as a user starts them, on a tiny model: to be killed, stopped, and started again by the
same command."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from helpers.jax_processes import with_devices
from helpers.tiny_models import word_collection

from search_r3_jax.config import LoraConfig
from search_r3_jax.data.dataset import build_dataset
from search_r3_jax.hub.checkpoint_reader import checkpoint_folder, checkpoint_steps, read_checkpoint
from search_r3_jax.hub.load_model import load_model, with_lora
from search_r3_jax.models.lora import trainable_filter

SOURCES, TESTS = Path(__file__).resolve().parents[2], Path(__file__).resolve().parents[1]
# What a step takes is no part of what it computes.
TIMES = ("seconds", "per_second", "mfu", "tflops", "stall_share", "milliseconds_per_query")

COMMON = {
    "config": "smollm2",
    "remat": "none",
    "text.max-query-tokens": 16,
    "text.max-document-tokens": 32,
    "text.max-thought-tokens": 8,
    "lora.rank": 4,
    "lora.dropout": 0.1,
    "data.dev-queries": 0,
}
SFT = {
    "sft.global-batch": 8,
    "sft.eval-every": 0,
    "sft.save-every": 3,
    "sft.keep": 2,
    "sft.reasoned-share": 0.25,
    "sft.key-terms": 2,
}
RL = {
    "rl.global-queries": 3,
    "rl.group-size": 4,
    "rl.eval-every": 0,
    "rl.save-every": 3,
    "rl.keep": 2,
    "rl.inner-epochs": 2,
    "rl.collapse.steps": 0,
    "rl.sampler.max-think-tokens": 6,
    "index.candidates": 12,
    "index.refresh-budget": 8,
    "index.overlay-max-age-steps": 4,
    "index.nice": 0,
}


class Place:
    """A folder with a model, a data set and runs, and the environment that commands are started in."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.model = folder, model
        self._started: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True, exist_ok=True)
        build_dataset(
            {"train": word_collection(documents=40, queries=20)},
            folder / "data",
            name="words",
            source={"kind": "test"},
        )

    def command(self, stage: str, run: str, *flags: str, **settings: Any) -> list[str]:
        """`search-r3 STAGE --run RUN …`; settings by their names with `__` for a dot."""
        own = SFT if stage == "sft" else RL
        asked = {name.replace("__", ".").replace("_", "-"): value for name, value in settings.items()}
        values = (
            {"run": self.folder / run, "model": self.model, "data.sets": self.folder / "data"}
            | COMMON
            | own
            | asked
        )
        pairs = [text for name, value in values.items() for text in (f"--{name}", str(value))]
        return [sys.executable, "-m", "search_r3_jax", stage, *pairs, *flags]

    def start(self, command: list[str], *, devices: int = 1, log: str = "out.txt") -> subprocess.Popen[bytes]:
        """The command as a process of its own; what it prints is added to a file."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(SOURCES), os.environ.get("PYTHONPATH", "")]),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": with_devices(devices),
            # Each device's part of a collective waits in a thread of its own.
            **({"NPROC": str(2 * devices)} if devices > 1 else {}),
        }
        with (self.folder / log).open("ab") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        self._started.append(process)
        return process

    def close(self) -> None:
        """End what a test that failed has left."""
        for process in self._started:
            process.kill()
            process.wait()

    def finish(self, command: list[str], *, devices: int = 1, status: int = 0) -> str:
        """Run a command to its end; what it printed."""
        process = self.start(command, devices=devices, log="finish.txt")
        assert process.wait(timeout=600) == status, (self.folder / "finish.txt").read_text()[-4000:]
        text = (self.folder / "finish.txt").read_text()
        (self.folder / "finish.txt").unlink()
        return text

    def cluster(
        self,
        command: list[str],
        *,
        processes: int,
        devices: int = 1,
        commands: Sequence[list[str]] = (),
    ) -> list[subprocess.Popen[bytes]]:
        """The command in several processes, or one of `commands` in each, which find each other by flags."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        flags = ["--cluster.coordinator", f"localhost:{port}", "--cluster.processes", str(processes)]
        return [
            self.start(
                [*each, *flags, "--cluster.process", str(process)],
                devices=devices,
                log=f"out-{process}.txt",
            )
            for process, each in enumerate(commands or [command] * processes)
        ]

    def lines(self, run: str) -> list[dict[str, Any]]:
        """What `metrics.jsonl` says, step by step; a line that is being written is left out."""
        file = self.folder / run / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []

    def params(self, run: str, step: int, *, rank: int = 4) -> Any:
        """The trainable parameters of a checkpoint, as NumPy arrays."""
        decoder = with_lora(load_model(self.model), LoraConfig(rank=rank), seed=0).decoder
        found = read_checkpoint(self.folder / run, step, nnx.state(decoder, trainable_filter(decoder)))
        return jax.tree.map(np.asarray, nnx.to_pure_dict(found))


# Gloo, which carries the collectives of processes on CPU, reports each connection in several writes; those
# of two threads may mix within a line.
GLOO = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. Expected number of connected peer ranks is : |[0-9]"
)


def spoken(printed: str) -> str:
    """What a process printed besides Gloo's reports, without digits and space at its ends."""
    return GLOO.sub("", printed).strip()


def computed(line: dict[str, Any]) -> dict[str, Any]:
    """A step's scalars without what depends on the clock."""
    return {name: value for name, value in line.items() if not name.endswith(TIMES)}


def until(found: Callable[[], bool], process: subprocess.Popen[bytes], *, seconds: float = 300) -> None:
    """Wait until something is so, or the process has ended."""
    end = time.monotonic() + seconds
    while not found() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)


def equal(ours: Any, theirs: Any) -> None:
    """Two trees of arrays are equal to the last bit."""
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def back_to(run: Path, step: int) -> None:
    """As if the run had been killed right after it saved `step`."""
    for later in checkpoint_steps(run):
        if later > step:
            shutil.rmtree(checkpoint_folder(run) / str(later))
