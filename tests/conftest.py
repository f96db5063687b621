"""Fixtures that several rooms' tests share."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from support import Trainer, train_command, write_dataset


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
        return subprocess.run(
            train_command(data, out, *overrides, options=options),
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            timeout=240,
        )

    return run
