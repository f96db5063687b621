"""What the tests of metrics share."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def promtool() -> str:
    """Return the path of promtool."""
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is not installed; `make system` installs it")
    return path
