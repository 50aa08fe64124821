"""An evaluation on eight devices, and in two processes, finds what one device finds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command_folder import Place, spoken

pytestmark = pytest.mark.slow


def command(place: Place, name: str, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "search_r3_jax", "eval", "--model", str(place.model)),
        *("--data", str(place.folder / "data"), "--split", "train", "--mode", "both"),
        *("--max-think-tokens", "6", "--out", str(place.folder / name), *flags),
    ]


def results(place: Place, name: str) -> dict[str, Any]:
    return json.loads((place.folder / name).read_text())


def check_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["system"] == theirs["system"]
    for mode in ("direct", "reason"):
        mine, other = (each["modes"][mode]["per_query"] for each in (ours, theirs))
        assert mine.keys() == other.keys()
        for query in mine:
            for metric in ("ndcg@10", "recall@10", "mrr"):
                assert mine[query][metric] == other[query][metric]


def test_eight_devices_and_two_processes_find_what_one_device_finds(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    place = Place(tmp_path, tiny_folders["llama"])
    try:
        place.finish(command(place, "one.json"))
        one = results(place, "one.json")
        place.finish(command(place, "eight.json", "--mesh.fsdp", "4", "--mesh.data", "2"), devices=8)
        check_same(results(place, "eight.json"), one)
        said = []
        for process in place.cluster(command(place, "two.json"), processes=2, devices=2):
            said.append(process.wait(timeout=300))
        printed = [(tmp_path / f"out-{number}.txt").read_text() for number in (0, 1)]
        assert said == [0, 0], printed
        check_same(results(place, "two.json"), one)
        assert "nDCG@10" in printed[0]
        assert spoken(printed[1]) == ""
        place.finish(command(place, "half.json", "--param-dtype", "bfloat16"), devices=4)
        half = results(place, "half.json")
        assert half["system"]["param_dtype"] == "bfloat16"
        assert half["system"]["parameter_hash"] != one["system"]["parameter_hash"]
        means = [each["modes"]["direct"]["ndcg@10"] for each in (half, one)]
        assert np.isclose(*means, atol=0.1)
    finally:
        place.close()
