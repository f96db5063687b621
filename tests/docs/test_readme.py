"""Every command of the README runs as a newcomer would run it: make demo first, then the tasks in their order."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from support import ROOT

SMALL = (
    "network.width=4 recipe.batch=16 schedule.total_images=96 schedule.log_every_images=32 schedule.evaluate_samples=64"
)
NOT_HERE = {"make demo", "make test"}
"""The fixture runs the first with a small network; the second is running right now."""


def readme_commands() -> list[str]:
    """Return the commands of the README's shell blocks, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and line not in NOT_HERE]


ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "ACCELERATE_USE_CPU": "true",
}


pytestmark = pytest.mark.timeout(900)


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout after `make demo`, with a folder of photos."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("pipeline", "data"):
        (folder / name).symlink_to(ROOT / name)
    photos = folder / "photos"
    photos.mkdir()
    for index in range(24):
        Image.effect_noise((90, 70), 20 + index).convert("RGB").save(photos / f"{index}.jpg")
    done = run(["make", "-C", str(ROOT), "demo", f"DEMO={folder / 'demo'}", f"TRAIN_OPTIONS={SMALL}"], folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return folder


def test_make_demo_shows_where_to_look_and_is_done_in_seconds_the_second_time(workspace: Path) -> None:
    demo = workspace / "demo"
    results = (
        "report.html",
        "run/samples/000000096.png",
        "bench/bench.json",
        "model/model.onnx",
        "samples/manifest.json",
    )
    for result in results:
        assert (demo / result).stat().st_size > 0, result
    start = {path: path.stat().st_mtime for path in demo.rglob("*")}
    again = run(["make", "-C", str(ROOT), "demo", f"DEMO={demo}"], workspace)
    assert again.returncode == 0
    assert str(demo / "report.html") in again.stdout
    assert {path: path.stat().st_mtime for path in demo.rglob("*")} == start, "nothing was made again"
    assert time.time() > max(start.values())


@pytest.mark.parametrize("command", readme_commands())
def test_command(workspace: Path, command: str) -> None:
    words = shlex.split(command)
    if words[0] == "accelerate":
        words[2:2] = [
            "--num_processes",
            "1",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
        ]
        words += SMALL.split() if "--preset" in words else []
    if words[:2] == ["dcgan-eval", "swd"]:
        words += ["--count", "500"]  # the network makes noise anyway
    done = run(words, workspace)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "Traceback" not in done.stderr
