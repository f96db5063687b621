"""Runs that several files look at or hit."""

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import warm_start
from support import train_command
from training_cases import ENVIRONMENT, SCHEDULE


@pytest.fixture(scope="session")
def whole_run(faces32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = warm_start.run(
        train_command(faces32, out, *SCHEDULE),
        env=ENVIRONMENT,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def started(faces32: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run in progress, slow enough to be hit."""
    out = tmp_path / "run"
    process = warm_start.Popen(train_command(faces32, out, *SCHEDULE), env=ENVIRONMENT, stderr=subprocess.PIPE)
    yield process, out
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute as the other trainers do, in this process, and give back what a trainer takes."""
    threads, hook = torch.get_num_threads(), threading.excepthook
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    threading.excepthook = hook
