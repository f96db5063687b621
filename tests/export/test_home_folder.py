"""Sampling reports to nobody, leaves nothing in the home folder, and needs neither a home nor a user name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from export_cases import Export
from picture_files import make_folder

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


PROGRAMS = {
    "build": "dcgan-data build folder PICTURES DATA --size 32 --shard-images 40 --workers 1",
    "train": "train --data DATA --out RUN network.image_size=32 network.width=4 recipe.batch=16 recipe.streams=8 "
    "schedule.total_images=64 schedule.evaluate_samples=64",
    "onnx": "dcgan-export onnx --ckpt RUN --out MODEL --max-batch 16 --parity-images 16",
    "bench": "dcgan-export bench --ckpt RUN --model MODEL/model.onnx --out BENCH --quick --batch 2",
    "generate": "dcgan-generate --model MODEL/model.onnx --count 32 --out SAMPLES",
    "swd": "dcgan-eval swd --samples SAMPLES --data DATA --count 32 --out EVAL",
    "report": "dcgan-eval report RUN --out EVAL/report.html",
}
MAIN = {
    "dcgan-data": "pipeline.data.cli:main",
    "train": "pipeline.train:run",
    "dcgan-export": "export.cli:main",
    "dcgan-generate": "deploy.generate:main",
    "dcgan-eval": "pipeline.evaluation.cli:main",
}
CACHES = (".cache/matplotlib", ".config/matplotlib")
"""What stays in a home folder: matplotlib's list of fonts."""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed; `make system-slow` installs it")
def test_no_program_asks_the_network_for_anything(tmp_path: Path) -> None:
    """From pictures to a report: every connection is to this machine, and no name is asked for."""
    make_folder(tmp_path / "PICTURES", 80)
    home = tmp_path / "home"
    home.mkdir()
    for name, line in PROGRAMS.items():
        program, *words = line.split()
        arguments = [str(tmp_path / word) if word.split("/")[0].isupper() else word for word in words]
        module, function = MAIN[program].split(":")
        code = f"import sys; sys.argv[0] = {program!r}; from {module} import {function}; {function}()"
        trace = tmp_path / f"{name}.trace"
        watch = ["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o", str(trace)]
        python(code, *arguments, before=watch, home=home)
        asked = [call for call in trace.read_text().splitlines() if "AF_INET" in call]
        assert [call for call in asked if "127.0.0.1" not in call and '"::1"' not in call] == [], name
        left = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]
        assert [path for path in left if not path.startswith(CACHES)] == [], name
    assert (tmp_path / "EVAL" / "report.html").exists()


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
