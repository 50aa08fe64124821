"""Several processes search an index in parts, each its share, and find what one process finds."""

from pathlib import Path

import pytest
from helpers.index_versions import publish
from helpers.jax_processes import run_processes
from helpers.platforms import needs_scann

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parents[1] / "helpers" / "team_index.py"


@pytest.mark.parametrize(
    ("kind", "parts", "processes"),
    [
        *(pytest.param("scann", *each, marks=needs_scann) for each in ((1, 2), (3, 1), (5, 2), (2, 3))),
        ("device", 1, 1),
        ("device", 1, 2),
    ],
)
def test_all_processes_find_what_one_finds(tmp_path: Path, kind: str, parts: int, processes: int) -> None:
    for step in (5, 6):
        publish(tmp_path / "index", step, kind=kind, parts=parts)
    reports = run_processes(PROGRAM, [str(tmp_path)], processes=processes, devices=2, timeout=200)
    first = reports[0]
    together = processes > 1 and (parts > 1 or kind == "device")
    alone = "DeviceIndex" if kind == "device" else "PartsIndex" if parts > 1 else "ScannIndex"
    assert first["kinds"] == ["TeamIndex" if together else alone, kind, 5, [200, 24]]
    assert len(first["equal"]) == 11
    assert all(first["equal"])
    for report in reports:
        assert report["done"]
        if together:
            assert "v6: another process cannot open its share" in report["damaged"]
