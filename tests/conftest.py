"""Fixtures that several rooms' tests share."""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import warm_start
from support import Trainer, train_command, write_dataset

LONGEST = ("tests/docs/test_readme.py", "tests/training/", "tests/export/")


def pytest_configure() -> None:
    """`nohup make test &` ignores signals that tests send, and a process that is started inherits that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, or one worker would be left with it at the end."""
    items.sort(key=lambda item: next((n for n, at in enumerate(LONGEST) if item.nodeid.startswith(at)), len(LONGEST)))


@pytest.fixture(scope="session")
def faces32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 packed 32x32 images in four shards."""
    return write_dataset(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture
def trainer() -> Trainer:
    """Run the trainer in a process of its own, on one thread."""

    def run(
        data: Path | str, out: Path, *overrides: str, options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        return warm_start.run(
            train_command(data, out, *overrides, options=options),
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            timeout=240,
        )

    return run
