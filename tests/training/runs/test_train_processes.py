"""Two processes that train together: stopping, a rank that dies or hangs, going on with another count."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ports import free_port
from support import ROOT, TINY, Trainer
from training_cases import ENVIRONMENT

OPTIONS = (
    "schedule.total_images=1000000",
    "schedule.log_every_images=32",
    "schedule.checkpoint_every_images=640",
    "schedule.evaluate_samples=64",
    "runtime.step_timeout_seconds=15",
)


def wait_for_children(process: int) -> list[psutil.Process]:
    """Return the children of a process, as soon as it has any."""
    children: list[psutil.Process] = []
    while not children:
        time.sleep(0.05)
        children = psutil.Process(process).children()
    return children


@pytest.fixture
def pair(faces32: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process], Path]]:
    """A run of two processes under dcgan-launch that has saved twice, its ranks, and its folder."""
    out = tmp_path / "run"
    launch = str(Path(sys.executable).parent / "dcgan-launch")
    command = [launch, "--processes", "2", "--grace-seconds", "20", "train", "--data", str(faces32), "--out", str(out)]
    process = subprocess.Popen(
        [*command, *TINY, *OPTIONS], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    try:
        for _ in range(1500):
            # The second: from the first is known how long one takes, and so when it hangs.
            if len(list(out.glob("checkpoints/*/state.json"))) > 1 or process.poll() is not None:
                break
            time.sleep(0.1)
        assert process.poll() is None, process.communicate()[1]
        everyone = psutil.Process(process.pid).children(recursive=True)
        ranks = sorted((p for p in everyone if "RANK" in p.environ()), key=lambda p: p.environ()["RANK"])
        assert [rank.environ()["WORLD_SIZE"] for rank in ranks] == ["2", "2"]
        yield process, ranks, out
    finally:
        for left in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            left.kill()
        process.kill()
        process.communicate()


STOPPED = """
import os, pathlib, signal, sys
from pipeline.common.command_line import run_command
from pipeline.config import load_config
from pipeline.training import schedule
from pipeline.training.loop import train
schedule.AGREEMENT_SECONDS = 0.2
def stop(position, reals, z):
    if position == 64 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
config = load_config(overrides=sys.argv[3:])
run_command(lambda: train(config, data=sys.argv[1], out=pathlib.Path(sys.argv[2]), on_batch=stop))
"""


def test_sigterm_to_one_rank_saves_once_for_all_long_before_the_log_boundary_and_one_process_goes_on(
    faces32: Path, tmp_path: Path, trainer: Trainer
) -> None:
    out, worker = tmp_path / "run", tmp_path / "worker.py"
    worker.write_text(STOPPED)
    settings = ["schedule.total_images=64000", "schedule.log_every_images=64000"]
    launch = str(Path(sys.executable).parent / "dcgan-launch")
    command = [launch, "--processes", "2", str(worker), str(faces32), str(out), *TINY, *OPTIONS, *settings]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 143, done.stderr
    (state,) = out.glob("checkpoints/*/state.json")
    saved, window = int(state.parent.name), json.loads(state.read_text())["window"]
    assert (window["begin"], window["steps"], len(window["totals"])) == (0, saved // 16, 2)
    assert (out / "metrics.jsonl").read_text() == ""
    done = trainer(faces32, out, f"schedule.total_images={saved + 64}")
    assert done.returncode == 0, done.stderr
    assert f"resuming at image {saved}" in done.stderr
    line, _ = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert (line["images"], 0 < line["d_real"] < 1) == (saved + 64, True)


@pytest.mark.parametrize(("number", "victim"), [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 1)])
def test_a_rank_that_dies_or_hangs_takes_the_other_down(
    pair: tuple[subprocess.Popen[str], list[psutil.Process], Path], number: signal.Signals, victim: int
) -> None:
    process, ranks, out = pair
    start = time.monotonic()
    ranks[victim].send_signal(number)
    try:
        _, errors = process.communicate(timeout=240)
    finally:
        if number == signal.SIGSTOP and ranks[victim].is_running():
            ranks[victim].kill()
    assert time.monotonic() - start < 220
    assert process.returncode not in (0, None), errors
    if number == signal.SIGSTOP:
        assert process.returncode == 75, errors
        assert "no step has finished for" in errors
    assert "Traceback" not in errors
    assert sorted(out.glob("checkpoints/*/state.json")), "the last checkpoint is still there"


def test_sigterm_while_the_other_machine_is_waited_for(faces32: Path, tmp_path: Path) -> None:
    """A pod whose peer was not scheduled yet has nothing to save: it ends at once, and not by SIGKILL."""
    launch = str(Path(sys.executable).parent / "dcgan-launch")
    where = ["--nodes", "2", "--node-rank", "0", "--address", "127.0.0.1", "--port", str(free_port())]
    command = [launch, *where, "train", "--data", str(faces32), "--out", str(tmp_path / "run"), *TINY, *OPTIONS]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        (rank,) = wait_for_children(process.pid)
        while not rank.net_connections():  # it waits for the other one there
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 143, errors
    finally:
        process.kill()
        process.communicate()


def test_ranks_with_different_settings_are_refused_at_once(faces32: Path, tmp_path: Path) -> None:
    """Two machines that read different configurations would hang at the first log boundary, or learn apart."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, pathlib, sys\n"
        "from pipeline.config import load_config\n"
        "from pipeline.common.command_line import run_command\n"
        "from pipeline.training.loop import train\n"
        "mine = ['schedule.log_every_images=64'] if os.environ['RANK'] == '1' else []\n"
        "config = load_config(overrides=sys.argv[3:] + mine)\n"
        "run_command(lambda: train(config, data=sys.argv[1], out=pathlib.Path(sys.argv[2])))\n"
    )
    launch = str(Path(sys.executable).parent / "dcgan-launch")
    done = subprocess.run(
        [launch, "--processes", "2", str(worker), str(faces32), str(tmp_path / "run"), *TINY, *OPTIONS],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78, done.stderr
    assert "ranks 0 and 1 have different settings: schedule.log_every_images 32 and 64" in done.stderr
