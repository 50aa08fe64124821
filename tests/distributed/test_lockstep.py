"""Process 0 leads: the others run what it calls, get what it found, and fail as it fails."""

from pathlib import Path

import numpy as np
import pytest
from helpers.jax_processes import run_processes

from search_r3_jax.distributed.lockstep import Message, Team
from search_r3_jax.errors import UserError

PROGRAM = Path(__file__).parents[1] / "helpers" / "lockstep_program.py"


@pytest.mark.slow
def test_two_processes_get_run_and_raise_the_same() -> None:
    first, second = run_processes(PROGRAM, [], processes=2, devices=2, timeout=300)
    assert first["told"] == second["told"]
    large = np.random.default_rng(0).normal(size=(100, 7)).astype(np.float32)
    assert first["told"]["large"] == ["float32", [100, 7], large.tolist()]
    assert first["told"]["scalar"] == ["int64", [], 5]
    assert first["told"]["empty"] == ["float32", [0, 3], []]
    assert first["told"]["doubled"] == ["int64", [2], [6, 8]]
    assert (first["told"]["nested"], first["told"]["none"], first["told"]["number"]) == (6, None, 0.1)
    assert first["ran"] == second["ran"] == [[3, 4], "nested", [0, 1, 2], [9], [1], [1], [1], [-1]]
    errors = [
        ["UserError", "a.b: 3: no; give 4\nx\ny"],
        ["StoppedError", "saved"],
        ["TransientError", "busy"],
    ]
    assert first["errors"] == second["errors"] == errors
    assert min(first["waited"], second["waited"]) > 44
    assert "data.sets: process 1 has other content than process 0" in first["differs"]
    assert first["differs"] == second["differs"]
    setting = "rl.beta: process 1 has another value than process 0; give all the same settings"
    assert first["settings"] == second["settings"] == setting
    assert (first["caught"], second["caught"]) == ({"caught": True}, "rows: below 0")


def test_one_process_leads_itself() -> None:
    team, ran = Team(), list[int]()
    call = team.together("add", lambda rows: ran.append(int(rows.sum())))

    def work() -> Message:
        call(np.arange(4))
        return {"there": True}

    assert team.lead(work) == {"there": True}
    assert ran == [6]
    team.require_same("data.sets", {"a": 1})
    team.require_same_settings({"rl.beta": 0.5})

    def fail() -> Message:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        team.lead(fail)
    team.forget("add")
    with pytest.raises(KeyError):
        team.forget("add")
