"""What the hub answers: a busy hub is asked again, by status 75; an unknown name is the user's mistake."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from search_r3_jax import cli
from search_r3_jax.config import RunConfig
from search_r3_jax.errors import TransientError, UserError
from search_r3_jax.hub import model_names
from search_r3_jax.hub.checkpoint_reader import starting_model
from search_r3_jax.hub.model_names import resolve
from search_r3_jax.training.run import starting_point


def refuse(monkeypatch: pytest.MonkeyPatch, status: int, kind: type[HfHubHTTPError]) -> None:
    def download(*_: object, **__: object) -> str:
        response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
        raise kind("no", response=response)

    monkeypatch.setattr(model_names, "snapshot_download", download)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    refuse(monkeypatch, status, HfHubHTTPError)
    with pytest.raises(TransientError, match=f"some/model: the hub is busy \\(status {status}"):
        resolve("some/model")


def chained(kind: type[Exception], cause: Exception) -> Any:
    """What `snapshot_download` does where nothing is cached: the hub's answer is the cause of its error."""

    def download(*_: object, **__: object) -> str:
        try:
            raise cause
        except Exception as error:
            raise kind("cannot find the requested files in the local cache") from error

    return download


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_told_from_its_cause(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    cause = HfHubHTTPError("no", response=response)
    monkeypatch.setattr(model_names, "snapshot_download", chained(LocalEntryNotFoundError, cause))
    with pytest.raises(TransientError, match=rf"some/model: the hub is busy \(status {status}"):
        resolve("some/model")


@pytest.mark.slow
def test_a_network_that_is_down_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Asked for real, by the library: nothing listens there."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = (
        "from search_r3_jax import cli; import sys; sys.argv = ['search-r3', 'think', '--model', "
        "'some/model', 'a query']; cli.main()"
    )
    environment = os.environ | {"HF_ENDPOINT": f"http://localhost:{port}", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (
        "some/model: no such folder, nor in the local Hugging Face cache, and the hub cannot" in done.stderr
    )
    assert done.returncode == 75
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "some/model: no such folder, and neither" in done.stderr
    assert done.returncode == 2


def test_an_unknown_name_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, 404, RepositoryNotFoundError)
    with pytest.raises(UserError, match="some/model: no such folder, and neither"):
        resolve("some/model")


def test_the_command_ends_with_the_status_that_launchers_start_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(monkeypatch, 503, HfHubHTTPError)
    monkeypatch.setattr("sys.argv", ["search-r3", "think", "--model", "some/model", "a query"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 75
    assert capsys.readouterr().err.startswith("search-r3: model: some/model: the hub is busy (status 503")


def test_a_commit_after_the_name_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit, asked = "0123456789" * 4, list[tuple[str, object]]()
    folder = tmp_path / "snapshots" / commit
    folder.mkdir(parents=True)

    def download(repo: str, *, revision: str | None, **_: object) -> str:
        asked.append((repo, revision))
        return str(folder)

    monkeypatch.setattr(model_names, "snapshot_download", download)
    assert model_names.hub_revision("some/model") == commit
    assert resolve(f"some/model@{commit}") == folder
    assert asked == [("some/model", None), ("some/model", commit)]
    # No files of the hub, so nothing that may change there.
    assert model_names.hub_revision(str(tmp_path)) is None
    with pytest.raises(UserError, match="no such file or folder"):
        resolve("some/model@main")


def test_a_run_keeps_the_commit_that_it_was_started_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    newest = ["1" * 40]

    def download(repo: str, *, revision: str | None, **_: object) -> str:
        folder = tmp_path / "snapshots" / (revision or newest[-1])
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.setattr(model_names, "snapshot_download", download)
    config, run = RunConfig(model="some/model"), tmp_path / "run"
    point = starting_point(run, config)
    assert point == {"revision": "1" * 40}
    run.mkdir()
    record = {"stage": "sft", "config": dataclasses.asdict(config)} | point
    (run / "config.json").write_text(json.dumps(record))
    newest.append("2" * 40)
    assert starting_point(run, config) == point
    assert starting_point(tmp_path / "another", config) == {"revision": "2" * 40}
    assert starting_model(run, record) == f"some/model@{'1' * 40}"
    # A run of an older version recorded none: nobody knows which it was.
    del record["revision"]
    (run / "config.json").write_text(json.dumps(record))
    assert starting_point(run, config) == {}
