"""Plans are of programs as they will run, with every optimisation."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _optimised(optimised: None) -> None:
    """For all modules here."""
