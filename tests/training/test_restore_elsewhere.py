"""A checkpoint that one device saved is gone on with on eight, on another mesh, by two processes, and back:
the losses stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.command_folder import Place, back_to, spoken

STEPS = 8
# Adapters alone, and all parameters with their moments.
KINDS = {"lora": {"lora__rank": 4, "lora__dropout": 0.0}, "full": {"lora__rank": 0, "lora__dropout": 0.0}}
BACK = {"mesh__data": 1, "mesh__fsdp": -1, "mesh__tensor": 1}
# Where a run goes after which step: devices, and their mesh.
MOVES: dict[str, list[tuple[int, int, dict[str, int]]]] = {
    "lora": [(2, 8, {"mesh__data": 2, "mesh__fsdp": 4}), (6, 1, BACK)],
    "full": [
        (2, 8, {"mesh__fsdp": 8}),
        (4, 8, {"mesh__data": 1, "mesh__fsdp": 4, "mesh__tensor": 2}),
        (6, 1, BACK),
    ],
}


def check(lines: list[dict[str, Any]], whole: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in lines] == list(range(STEPS))
    for ours, theirs in zip(lines, whole, strict=True):
        for name in ("loss", "infonce", "language", "kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), (ours["step"], name)


@pytest.mark.slow
# Adapters move between one process and two below.
@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.exhaustive), "full"])
def test_saved_on_one_device_resumed_on_others_and_back(place: Place, tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    settings = KINDS[kind] | {"sft__steps": STEPS, "sft__keep": 9, "sft__save_every": 2}
    place.finish(place.command("sft", "run", **settings))
    whole = place.lines("run")
    for step, devices, mesh in MOVES[kind]:
        back_to(run, step)
        said = place.finish(place.command("sft", "run", **settings, **mesh), devices=devices)
        assert f"going on from step {step}" in said
        assert "harmless: config.mesh." in said
        check(place.lines("run"), whole)


@pytest.mark.slow
def test_saved_by_one_process_resumed_by_two_and_back(place: Place, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # The model writes its own reasoning, and development queries are watched: all processes take part in that
    # too.
    settings = KINDS["lora"] | {
        "sft__steps": STEPS,
        "sft__keep": 9,
        "sft__save_every": 2,
        "sft__reasoning": "self",
    }
    settings |= {"sft__eval_every": 4, "data__dev_queries": 8}
    place.finish(place.command("sft", "run", **settings))
    whole = place.lines("run")
    watched = [line["dev_reason_ndcg@10"] for line in whole if "dev_reason_ndcg@10" in line]
    assert len(watched) == 2
    back_to(run, 2)
    (run / "own_reasoning.jsonl").unlink()
    for process in place.cluster(
        place.command("sft", "run", **settings, mesh__fsdp=2, mesh__data=2), processes=2, devices=2
    ):
        assert process.wait(timeout=300) == 0, (tmp_path / "out-0.txt").read_text()[-3000:]
    assert "going on from step 2" in (tmp_path / "out-0.txt").read_text()
    assert [
        line["dev_reason_ndcg@10"] for line in place.lines("run") if "dev_reason_ndcg@10" in line
    ] == watched
    # One of them speaks.
    assert spoken((tmp_path / "out-1.txt").read_text()) == ""
    check(place.lines("run"), whole)
    back_to(run, 6)
    assert "going on from step 6" in place.finish(place.command("sft", "run", **settings))
    check(place.lines("run"), whole)


@pytest.mark.slow
def test_stage_2_saved_on_one_device_resumed_on_eight_and_back(place: Place, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {
        "rl__steps": STEPS,
        "rl__keep": 9,
        "rl__save_every": 2,
        "rl__global_queries": 8,
        "rl__group_size": 2,
    }
    place.finish(place.command("rl", "run", **settings))
    whole = place.lines("run")
    for step, devices, mesh in (
        (2, 8, {"mesh__data": 2, "mesh__fsdp": 4}),
        (4, 1, {"mesh__data": 1, "mesh__fsdp": -1}),
    ):
        back_to(run, step)
        said = place.finish(place.command("rl", "run", **settings, **mesh), devices=devices)
        assert f"going on from step {step}" in said
        lines = place.lines("run")
        assert [line["step"] for line in lines] == list(range(STEPS))
        for ours, theirs in zip(lines, whole, strict=True):
            # The same index schedule, whatever the indexer has made meanwhile.
            assert ours["index_step"] == theirs["index_step"]
            for name in ("loss", "reward", "kl", "infonce"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), (ours["step"], name)
