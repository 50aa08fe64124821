"""A program for tests: `search-r3` on an odd machine. Its searches differ in the last bit, its clock is an
hour off, and the files of the run appear late: five seconds, or what LATE_SECONDS in the environment says.

Arguments: those of `search-r3`.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

LATE_SECONDS, CLOCK_SECONDS = float(os.environ.get("LATE_SECONDS", "5")), 3600.0
real_time, real_stat, real_open, real_iterdir = time.time, Path.stat, Path.open, Path.iterdir


def is_late(path: Path) -> bool:
    """Whether a file of the run is so new that this machine does not see it."""
    try:
        return (
            bool(RUN) and str(path).startswith(RUN) and real_time() - real_stat(path).st_mtime < LATE_SECONDS
        )
    except OSError:
        return False


def late_stat(path: Path, *arguments: Any, **named: Any) -> os.stat_result:
    if is_late(path):
        raise FileNotFoundError(2, "not here yet", str(path))
    return real_stat(path, *arguments, **named)


def late_open(path: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
    if "r" in mode and is_late(path):
        raise FileNotFoundError(2, "not here yet", str(path))
    return real_open(path, mode, *arguments, **named)


def late_iterdir(path: Path) -> Iterator[Path]:
    return (each for each in real_iterdir(path) if not is_late(each))


def main() -> None:
    from search_r3_jax import cli
    from search_r3_jax.retrieval.index.exact import ExactIndex

    search = ExactIndex.search

    def perturbed(index: ExactIndex, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = search(index, queries, k)
        # Where two are close, the order changes too.
        scores = np.nextafter(scores, np.where(rows % 2, np.inf, -np.inf).astype(np.float32))
        order = np.argsort(-scores, axis=1, kind="stable")
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)

    index, path = cast(Any, ExactIndex), cast(Any, Path)
    index.search = perturbed
    time.time = lambda: real_time() + CLOCK_SECONDS
    path.stat, path.open, path.iterdir = late_stat, late_open, late_iterdir
    cli.main()


if __name__ == "__main__":
    RUN = sys.argv[sys.argv.index("--run") + 1]
    main()
