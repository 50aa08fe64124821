"""Several processes search an index in parts, each its share, and find what one process finds."""

from pathlib import Path

import pytest
from helpers.index_versions import publish
from helpers.jax_processes import run_processes

from search_r3_jax.retrieval.index.scann import scann_available

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not scann_available(), reason="scann has wheels for Linux only"),
]
PROGRAM = Path(__file__).parents[1] / "helpers" / "index_in_parts.py"


@pytest.mark.parametrize(("parts", "processes"), [(1, 2), (3, 1), (5, 2), (2, 3)])
def test_all_processes_find_what_one_finds(tmp_path: Path, parts: int, processes: int) -> None:
    for step in (5, 6):
        publish(tmp_path / "index", step, kind="scann", parts=parts)
    reports = run_processes(PROGRAM, [str(tmp_path)], processes=processes, devices=1, timeout=200)
    first = reports[0]
    assert first["kinds"] == [
        "SharedIndex" if parts > 1 and processes > 1 else "PartsIndex" if parts > 1 else "ScannIndex",
        "scann",
        5,
        [200, 24],
    ]
    assert len(first["equal"]) == 11
    assert all(first["equal"])
    for report in reports:
        assert report["done"]
        if parts > 1 and processes > 1:
            assert "v6: another process cannot open its parts" in report["damaged"]
