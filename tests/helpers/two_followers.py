"""A program for tests: two trainers' processes follow one index; prints the versions that each takes in, as
JSON.

Arguments: the run's folder, process index, number of processes, port of the coordinator. Process 1 cannot
open version 2.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from helpers.index_versions import FIELDS, unit
from helpers.log_lines import collect_log_lines
from jax.experimental import multihost_utils

from search_r3_jax.config import IndexConfig
from search_r3_jax.retrieval.indexer import follower as module
from search_r3_jax.retrieval.indexer.follower import IndexFollower
from search_r3_jax.retrieval.indexer.worker import index_folder
from search_r3_jax.retrieval.store.versions import IndexVersionError, PublishOptions, publish_version

STEPS_A_VERSION = 40


def main(folder: str, process: int, processes: int, port: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, process)
    run = Path(folder)
    opened = module.open_version

    def stubborn(root: Any, step: int, **named: Any) -> Any:
        if step == 2 and process == 1:
            raise IndexVersionError("version 2: cannot be read here")
        # One process is slower than the other.
        time.sleep(0.3 * process)
        return opened(root, step, **named)

    module.open_version = stubborn
    with collect_log_lines() as lines:
        taken = follow(run, process)
    print(json.dumps({"taken": taken, "said": lines}))


def follow(run: Path, process: int) -> list[list[int]]:
    follower = IndexFollower(run, "c", 9, settings=IndexConfig(local=False))
    follower.start()
    taken: list[list[int]] = []
    version: int | None = None
    for step in range(3 * STEPS_A_VERSION):
        if step % STEPS_A_VERSION == 0 and process == 0:
            number = step // STEPS_A_VERSION + 1
            vectors = unit(50, seed=number)
            publish_version(
                index_folder(run),
                step=number,
                vectors=vectors,
                ids=[f"d{i}" for i in range(50)],
                manifest_fields=FIELDS,
                options=PublishOptions(kind="exact"),
            )
        multihost_utils.sync_global_devices(f"step {step}")
        index = follower.newer_than(version, at_most=step)
        if index is not None:
            version = index.version
            taken.append([step, version])
            np.testing.assert_allclose(index.take(np.arange(50)), unit(50, seed=version))
        time.sleep(0.05)
    follower.close()
    return taken


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
