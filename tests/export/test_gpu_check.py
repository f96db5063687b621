"""`make gpu-check` on a machine without a GPU says so and does nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from export.driver import driver_version

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"


@pytest.mark.skipif(driver_version() is not None, reason="tells what happens without an NVIDIA driver")
def test_it_explains_itself_without_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "out"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr == "error: no NVIDIA GPU with a driver here: gpu-check has nothing to check\n"
    assert not (tmp_path / "out").exists()
