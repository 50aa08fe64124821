"""Places to run commands in, which leave no process behind."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command_folder import Place


@pytest.fixture
def place(tiny_folders: dict[str, Path], tmp_path: Path) -> Iterator[Place]:
    """A folder with a tiny model and a data set; whatever was started there has ended afterwards."""
    made = Place(tmp_path, tiny_folders["llama"])
    yield made
    made.close()
