"""Processes that work together start together, wait for each other's data, and end with the code they should."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, TINY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1100)]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
SETTINGS = (
    "schedule.total_images=320",
    "schedule.log_every_images=32",
    "schedule.evaluate_samples=64",
    "runtime.step_timeout_seconds=8",
)
LAUNCH = [str(Path(sys.executable).parent / "dcgan-launch"), "--processes", "2"]

ROUNDS = 200
STARTS_AND_ENDS = '''
"""Starts two ranks again and again, by fork: torch is imported once. Prints what ended with another code."""
import os, pathlib, signal, socket, sys
import accelerate, torch
from pipeline.common.command_line import run_command
from pipeline.common.errors import DataError, Stopped
from pipeline.training.accelerator import make_accelerator, meet_peers, together, wait_for_all
from pipeline.training.watchdog import Watchdog

folder, rounds = pathlib.Path(sys.argv[1]), int(sys.argv[2])

def work(end):
    with Watchdog(30.0, meet_peers()) as watchdog:
        accelerator = make_accelerator()
        def begin():
            if end == 65 and accelerator.process_index == 1:
                raise DataError("shard: damaged")
        together(accelerator, begin)
        watchdog.beat()
        wait_for_all(accelerator)
    accelerator.end_training()
    if end == 143:
        raise Stopped("at image 16")

for number in range(rounds):
    end = (0, 65, 143)[number % 3]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    children = []
    for rank in range(2):
        if child := os.fork():
            children.append(child)
            continue
        said = os.open(folder / f"{number}-{rank}", os.O_CREAT | os.O_WRONLY)
        os.dup2(said, 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        run_command(lambda: work(end))
        sys.exit(0)
    for rank, child in enumerate(children):
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != end:
            print(f"round {number}, rank {rank}: {code} instead of {end}")
            print((folder / f"{number}-{rank}").read_text())
'''


def test_two_hundred_starts_and_ends_of_two_processes_have_the_codes_they_should(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(STARTS_AND_ENDS)
    said = tmp_path / "said"
    said.mkdir()
    command = [sys.executable, str(worker), str(said), str(ROUNDS)]
    done = subprocess.run(
        command, cwd=ROOT, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert len(list(said.iterdir())) == 2 * ROUNDS


WAITS = """
import os, pathlib, sys, time
from pipeline.common.command_line import run_command
from pipeline.config import load_config
from pipeline.data.loading.loader import Loader
from pipeline.training.loop import train
next_batch = Loader.next_batch
def late(loader):
    if loader.position == 160 and loader.rank == 1:
        time.sleep(30)
    return next_batch(loader)
Loader.next_batch = late
config = load_config(overrides=sys.argv[3:])
run_command(lambda: train(config, data=sys.argv[1], out=pathlib.Path(sys.argv[2])))
"""


def test_a_rank_whose_data_come_late_is_waited_for_and_named(faces32: Path, tmp_path: Path) -> None:
    worker, out = tmp_path / "worker.py", tmp_path / "run"
    worker.write_text(WAITS)
    command = [*LAUNCH, str(worker), str(faces32), str(out), *TINY, *SETTINGS]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = (out / "log.txt").read_text()
    assert "rank 1 has waited " in said
    assert f" s for data: {faces32}" in said


@pytest.fixture
def hindrance(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[list[str], int]]:
    """Return options with which one rank alone cannot start, and the code that all must end with."""
    if request.param == "port":
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield ["--metrics-port", str(server.getsockname()[1])], 2
    elif request.param == "lock":
        (tmp_path / "run").mkdir()
        held = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(); sys.stdin.read()"
        command = [sys.executable, "-c", held, str(tmp_path / "run" / ".lock")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            yield [], 75
            holder.kill()
    else:
        yield ["--mirror", "http://127.0.0.1:9/mirror"], 75


@pytest.mark.parametrize("hindrance", ["port", "lock", "mirror"], indirect=True)
def test_one_that_cannot_start_takes_the_other_with_it(
    hindrance: tuple[list[str], int], faces32: Path, tmp_path: Path
) -> None:
    options, code = hindrance
    command = [*LAUNCH, "--grace-seconds", "60", "train", "--data", str(faces32), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, *options, *TINY, *SETTINGS], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert sum(line.startswith("error: rank 0: ") for line in done.stderr.splitlines()) == 1, done.stderr
    assert "said nothing" not in done.stderr, "a rank that tries for half a minute is not taken for gone"


def test_one_that_hangs_while_all_start_ends_the_others(faces32: Path, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(HANGS)
    began = time.monotonic()
    command = [*LAUNCH, "--grace-seconds", "5", str(worker), str(faces32), str(tmp_path / "run"), *TINY, *SETTINGS]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stderr
    assert "error: rank 0: rank 1 said nothing for 8 s while all start" in done.stderr
    assert "in gather_object" in done.stderr, "where it waited"
    assert time.monotonic() - began < 60


HANGS = """
import os, pathlib, signal, sys
from pipeline.common.command_line import run_command
from pipeline.config import load_config
from pipeline.training import loop
def hang(location):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    return open_dataset(location)
open_dataset, loop.open_dataset = loop.open_dataset, hang
config = load_config(overrides=sys.argv[3:])
run_command(lambda: loop.train(config, data=sys.argv[1], out=pathlib.Path(sys.argv[2])))
"""
