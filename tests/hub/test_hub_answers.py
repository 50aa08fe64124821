"""What the hub answers: a busy hub is asked again, by status 75; an unknown name is the user's mistake."""

from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from search_r3_jax import cli
from search_r3_jax.errors import TransientError, UserError
from search_r3_jax.hub import load_model
from search_r3_jax.hub.load_model import resolve


def refuse(monkeypatch: pytest.MonkeyPatch, status: int, kind: type[HfHubHTTPError]) -> None:
    def download(*_: object, **__: object) -> str:
        response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
        raise kind("no", response=response)

    monkeypatch.setattr(load_model, "snapshot_download", download)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    refuse(monkeypatch, status, HfHubHTTPError)
    with pytest.raises(TransientError, match=f"some/model: the hub is busy \\(status {status}"):
        resolve("some/model")


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
