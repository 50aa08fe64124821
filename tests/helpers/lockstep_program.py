"""A program for tests: two processes led by the first; prints what each of them got and ran, as JSON.

Arguments: process index, number of processes, port of the coordinator.
"""

import json
import sys
import time
from typing import Any

import jax
import numpy as np
from helpers.jax_processes import joined

from search_r3_jax.distributed.lockstep import Message, Team
from search_r3_jax.errors import EmbeddingError, StoppedError, TransientError, UserError


def main() -> None:
    team, ran = Team(), list[Any]()
    process = jax.process_index()
    report: dict[str, Any] = {"process": process}

    def double(rows: np.ndarray) -> np.ndarray:
        ran.append(rows.tolist())
        if (rows < 0).any():
            raise EmbeddingError("rows: below 0")
        return 2 * rows

    together = team.together("double", double)

    def inner() -> Message:
        return {"sum": int(together(np.arange(3)).sum())}

    def nested() -> int:
        ran.append("nested")
        return int(team.lead(inner)["sum"])

    nested_together = team.together("nested", nested)

    def work() -> Message:
        # Of process 0 alone: the number of a process would show in the message.
        large = np.random.default_rng(process).normal(size=(100, 7)).astype(np.float32)
        return {
            "large": large,
            "scalar": np.array(process + 5),
            "empty": np.zeros((0, 3), np.float32),
            "doubled": together(np.array([3, 4])),
            "nested": nested_together(),
            "none": None,
            "number": 0.1,
        }

    told = team.lead(work)
    report["told"] = {
        name: [str(value.dtype), list(value.shape), value.tolist()]
        if isinstance(value, np.ndarray)
        else value
        for name, value in told.items()
    }
    # Outside of `lead` both call it themselves.
    assert together(np.array([9])).tolist() == [18]

    def caught() -> Message:
        try:
            together(np.array([-1]))
        except EmbeddingError:
            return {"caught": True}
        return {}

    report["errors"] = []
    passed = UserError("a.b: 3: no; give 4", table=["x", "y"]), StoppedError("saved"), TransientError("busy")
    for error in passed:

        def fail(error: Exception = error) -> Message:
            together(np.array([1]))
            raise error

        try:
            team.lead(fail)
        except (UserError, TransientError, StoppedError) as found:
            report["errors"].append([type(found).__name__, str(found)])
    # Longer than any collective of a backend may be allowed to take.
    started = time.monotonic()

    def slow() -> Message:
        time.sleep(45)
        return {}

    team.lead(slow)
    report["waited"] = time.monotonic() - started
    try:
        team.require_same("data.sets", {"same": 1})
        team.require_same("data.sets", {"process": process})
    except UserError as found:
        report["differs"] = str(found)
    try:
        team.require_same_settings({"sft.steps": 3, "rl.beta": 0.5, "rl.reward": {"variant": "dcg"}})
        team.require_same_settings({"sft.steps": 3, "rl.beta": 0.5 + process, "rl.eval_every": process})
    except UserError as found:
        report["settings"] = str(found)
    # Process 0 may go on after an embedding failed; the others, which it failed in too, may not.
    try:
        report["caught"] = dict(team.lead(caught))
    except EmbeddingError as found:
        report["caught"] = str(found)
    report["ran"] = ran
    print(json.dumps(report))


if __name__ == "__main__":
    with joined(sys.argv[-3:]):
        main()
