"""Traces of steps: which steps are in them, by which names, and ranges that are refused before the work."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import jax.numpy as jnp
import pytest
from helpers.command_folder import Place
from helpers.command_line import search_r3_here
from helpers.sft_runs import config_of, train
from helpers.tiny_models import word_collection

from search_r3_jax.data.dataset import build_dataset
from search_r3_jax.errors import UserError
from search_r3_jax.profiling import parse_steps, part, step, trace_run, trace_steps


def steps_in(folder: Path) -> dict[str, set[int]]:
    """The numbers of the steps in a folder's one trace, by the names that the host's row has; -1: none."""
    (file,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    found: dict[str, set[int]] = {}
    for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]:
        number = event.get("args", {}).get("step_num", -1)
        found.setdefault(event.get("name", ""), set()).add(int(number))
    return found


def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path: Path, log_lines: list[str]) -> None:
    lasts = []
    with trace_steps("train", parse_steps("2:4"), tmp_path / "profile"):
        for number in range(6):
            with step("train", number) as last:
                lasts.append(last)
                with part("next batch"):
                    jnp.ones(8).sum().block_until_ready()
            with step("encode"):
                pass
    assert lasts == [False, False, False, True, False, False]
    found = steps_in(tmp_path / "profile")
    assert found["train"] == {2, 3}
    assert "next batch" in found
    assert log_lines == [f"profile: xprof --logdir {tmp_path / 'profile'} shows the trace"]


def test_steps_without_a_number_are_counted_and_work_may_end_early(tmp_path: Path) -> None:
    def work(steps: int) -> None:
        with trace_steps("encode", range(1, 9), tmp_path / "profile"):
            for _ in range(steps):
                with step("encode"):
                    jnp.ones(8).sum().block_until_ready()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work(3)
    assert steps_in(tmp_path / "profile")["encode"] == {1, 2}


def test_a_range_that_never_came_and_a_folder_that_cannot_be_written_end_no_work(
    tmp_path: Path, log_lines: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    # A mistake is said alone.
    with pytest.raises(UserError), trace_steps("train", range(7, 9), tmp_path / "late"):
        raise UserError("--data: nothing there")
    assert log_lines == []
    with trace_steps("train", range(7, 9), tmp_path / "late"), step("train", 0):
        pass
    with trace_steps("train", range(0, 1), tmp_path / "file" / "folder"), step("train", 0):
        pass
    assert not (tmp_path / "late").exists()
    assert log_lines[0] == "warning: profile: 1 steps were run, none of 7:9: nothing is traced"
    assert log_lines[1].startswith(f"warning: profile: {tmp_path}/file/folder: cannot be written (")
    assert len(log_lines) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", r"--profile-steps: 5: give FIRST:END, such as 3:6"),
        ("-1:4", r"--profile-steps: -1:4: give FIRST:END"),
        ("a:b", r"--profile-steps: a:b: give FIRST:END"),
        ("4:4", r"--profile-steps: 4:4: holds no step; give an END above FIRST"),
        ("6:3", r"--profile-steps: 6:3: holds no step"),
        ("8:11", r"--profile-steps: 8:11: there are 10 steps \(sft.steps\); give an END of at most 10"),
    ],
)
def test_a_wrong_range_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_steps(text, total=10, of="steps (sft.steps)")
    assert "\n" not in str(caught.value)


def test_a_range_is_python_s() -> None:
    assert parse_steps("3:6", total=6, of="steps") == range(3, 6)
    assert parse_steps(None, total=6) is None


@pytest.mark.parametrize("command", ["sft", "rl"])
def test_training_refuses_a_wrong_range_before_the_work(tmp_path: Path, command: str) -> None:
    run = tmp_path / "run"
    options = ("--config", "smollm2", "--run", str(run), f"--{command}.steps", "20")
    done = search_r3_here(command, *options, "--profile-steps", "18:21")
    told = (
        f"search-r3: --profile-steps: 18:21: there are 20 steps ({command}.steps); give an END of at most 20"
    )
    assert (done.returncode, done.stderr.strip()) == (2, told)
    assert not run.exists()


@pytest.mark.slow
def test_a_trace_of_stage_1(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    with trace_run(range(1, 3), tmp_path / "run"):
        train(
            config_of(tiny_folders["llama"], 4), tmp_path / "run", word_collection(documents=20, queries=20)
        )
    found = steps_in(tmp_path / "run/profile")
    assert found["train"] == {1, 2}
    assert {"next batch", "wait for the update"} <= found.keys()


def test_embed_traces_its_passes_and_tells_its_rate(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    texts, out, profile = tmp_path / "texts.txt", tmp_path / "vectors.npy", tmp_path / "profile"
    # Texts of two lengths of rows take two passes.
    texts.write_text("short\n" * 40 + "long " * 70 + "\n")
    options = ("--model", str(tiny_folders["llama"]), "--input", str(texts), "--out", str(out))
    done = search_r3_here("embed", *options, "--profile-steps", "1:2", "--profile-folder", str(profile))
    assert done.returncode == 0, done.stderr
    told, summary = done.stdout.splitlines()
    assert told == f"profile: xprof --logdir {profile} shows the trace"
    assert " tokens/s a chip)" in summary
    assert steps_in(profile)["encode"] == {1}

    done = search_r3_here("embed", *options, "--profile-steps", "41:50", "--profile-folder", str(profile))
    assert done.returncode == 2
    assert done.stderr == (
        "search-r3: --profile-steps: 41:50: 41 texts take 41 passes at most; begin earlier\n"
    )


@pytest.mark.slow
def test_a_trace_of_stage_2_names_its_acts(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    place = Place(tmp_path, tiny_folders["llama"])
    try:
        said = place.finish(place.command("rl", "run", "--profile-steps", "1:3", rl__steps=4))
    finally:
        place.close()
    assert "shows the trace" in said
    found = steps_in(tmp_path / "run/profile")
    assert found["train"] == {1, 2}
    assert {"rollout", "rewards", "update"} <= found.keys()


@pytest.mark.slow
def test_eval_traces_its_passes_and_refuses_baselines(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    words = {"test": word_collection(documents=20, queries=8, split="test")}
    build_dataset(words, tmp_path / "data", name="words", source={"kind": "test"})
    data, profile = ("--data", str(tmp_path / "data")), ("--profile-folder", str(tmp_path / "profile"))
    model = ("--model", str(tiny_folders["llama"]), "--out", str(tmp_path / "out.json"))
    done = search_r3_here("eval", *model, *data, "--profile-steps", "0:1", *profile)
    assert done.returncode == 0, done.stderr
    assert steps_in(tmp_path / "profile")["encode"] == {0}
    assert "tokens/s a chip" in done.stdout
    encoding = json.loads((tmp_path / "out.json").read_text())["encoding"]
    assert encoding["tokens_per_second_per_chip"] == encoding["tokens_per_second"] > 0
    done = search_r3_here("eval", "--model", "bm25", *data, "--profile-steps", "0:1", *profile)
    told = "search-r3: --profile-steps: bm25 does not run in JAX; leave it out"
    assert (done.returncode, done.stderr.strip()) == (2, told)
