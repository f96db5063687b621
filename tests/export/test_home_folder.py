"""Sampling reports to nobody, leaves nothing in the home folder, and needs neither a home nor a user name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from export_cases import Export

NOBODY = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
"""Runs a command as a user whom the system's list does not have."""

# Not what pytest was started with: libraries are quiet where CI is set, and ORT_DISABLE_TELEMETRY must come from us.
ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}


def python(code: str, *arguments: object, before: list[str], home: Path | None = None) -> None:
    done = subprocess.run(
        [*before, sys.executable, "-c", code, *map(str, arguments)],
        env=ENVIRONMENT | ({"HOME": str(home)} if home else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


SAMPLE = """
import sys
from export.samplers.open import open_sampler
for backend in ("openvino", "onnxruntime"):
    assert list(open_sampler(sys.argv[1], backend=backend, batch=4, threads=1).sample_range(seed=0, start=0, count=4))
"""


def test_nothing_is_reported_or_left_behind(exported: Export, tmp_path: Path) -> None:
    home, trace = tmp_path / "home", tmp_path / "trace"
    home.mkdir()
    watch = ["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmmsg", "-o", str(trace)]
    python(SAMPLE, exported.model, before=watch if shutil.which("strace") else [], home=home)
    assert [str(path) for path in home.rglob("*")] == []
    assert not trace.exists() or "AF_INET" not in trace.read_text()


@pytest.fixture(scope="module")
def nobody() -> list[str]:
    if subprocess.run([*NOBODY, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs unprivileged user namespaces, or root")
    return NOBODY


GENERATE = "import sys; sys.argv[0] = 'dcgan-generate'; from deploy.generate import main; main()"
EXPORT = "import sys; sys.argv[0] = 'dcgan-export'; from export.cli import main; main()"


def test_generating_needs_no_home(exported: Export, tmp_path: Path, nobody: list[str]) -> None:
    options = ("--count", 4, "--backend", "openvino", "--out", tmp_path / "out")
    python(GENERATE, "--model", exported.model, *options, before=nobody)


@pytest.mark.slow  # torch's exporter, in a process of its own
def test_exporting_needs_no_home(exported: Export, tmp_path: Path, nobody: list[str]) -> None:
    python(EXPORT, "onnx", "--ckpt", exported.checkpoint, "--out", tmp_path / "out", before=nobody)
