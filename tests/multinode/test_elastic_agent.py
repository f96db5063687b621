"""Why dcgan-launch starts processes itself: what torch.distributed.elastic, as a library, does at the same accidents.

docs/architecture.md names these reasons. A test that fails here says that one of them is gone, with a new torch.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from ports import free_port
from test_multinode import ADDRESSES, NODES, cable, ip

__all__ = ["cable"]
pytestmark = pytest.mark.slow
namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None,
    reason="needs root, and iproute2 (`make system` installs it), for network namespaces",
)

AGENT = """
import sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
node, nodes, address, port, *command = sys.argv[1:]
host = address.split(",")
config = LaunchConfig(
    min_nodes=int(nodes), max_nodes=int(nodes), nproc_per_node=1, run_id="run", max_restarts=3, monitor_interval=0.1,
    rdzv_backend="c10d", rdzv_endpoint=f"{host[0]}:{port}", rdzv_configs={"is_host": str(node == "0")},
    local_addr=host[int(node)],
)
try:
    elastic_launch(config, sys.executable)(*command)
except ChildFailedError as error:
    _, failure = error.get_first_failure()
    sys.exit(failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode)
"""
WORKER = """
import os, pathlib, signal, sys, time
note = pathlib.Path(sys.argv[1] + "-" + os.environ["RANK"])
def say(word):
    with note.open("a") as file:
        file.write(word + "\\n")
def stop(number, frame):
    say("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR1, lambda number, frame: say("heard"))
say(f"pid {os.getpid()}")
if sys.argv[2] != "wait":
    sys.exit(int(sys.argv[2]))
time.sleep(600)
"""
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the agent of a node: start("wait"), or in a namespace: start("wait", node=1, port=29400)."""
    (tmp_path / "agent.py").write_text(AGENT)
    (tmp_path / "worker.py").write_text(WORKER)
    started: list[subprocess.Popen[bytes]] = []

    def run(what: str, node: int | None = None, port: int = 0) -> "subprocess.Popen[bytes]":
        inside = [] if node is None else ["ip", "netns", "exec", NODES[node]]
        place = ["0", "1", "127.0.0.1", str(free_port())]
        if node is not None:
            place = [str(node), "2", ",".join(ADDRESSES), str(port)]
        files = [str(tmp_path / name) for name in ("agent.py", "worker.py", "rank")]
        command = [*inside, sys.executable, files[0], *place, *files[1:], what]
        with (tmp_path / "log").open("ab") as log:  # no pipe, which a process that outlives the agent would hold open
            process = subprocess.Popen(command, stderr=log, start_new_session=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
    for pid in pids(tmp_path, 0) + pids(tmp_path, 1):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def said(folder: Path, rank: int = 0) -> list[str]:
    file = folder / f"rank-{rank}"
    return file.read_text().splitlines() if file.exists() else []


def pids(folder: Path, rank: int = 0) -> list[int]:
    return [int(line.split()[1]) for line in said(folder, rank) if line.startswith("pid ")]


def until(true: Callable[[], bool], *alive: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 300
    while not true():
        for process in alive:
            assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_starts_again_what_will_fail_again(start: Start, tmp_path: Path) -> None:
    """Bad data (65), a contradiction (78): dcgan-launch starts 75 and kills again, and nothing else."""
    process = start("65")
    assert process.wait(300) == 65
    assert len(pids(tmp_path)) == 1 + 3


def test_the_code_of_a_stop_is_lost(start: Start, tmp_path: Path) -> None:
    """A Job, and the job scripts for Slurm, know by 143 that the run has saved and that this is no failure."""
    process = start("wait")
    until(lambda: bool(pids(tmp_path)), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 1
    assert said(tmp_path)[-1] == "saved"
    assert "SignalException" in (tmp_path / "log").read_text()


def test_a_wish_to_save_kills_it(start: Start, tmp_path: Path) -> None:
    """SIGUSR1 asks a run to save and to go on."""
    process = start("wait")
    until(lambda: bool(pids(tmp_path)), process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(300) == -signal.SIGUSR1
    assert "heard" not in said(tmp_path)


@namespaces
def test_a_killed_process_starts_all_again(cable: None, start: Start, tmp_path: Path) -> None:
    """This it does as dcgan-launch does."""
    agents = [start("wait", node, 29400) for node in (0, 1)]
    until(lambda: bool(pids(tmp_path, 0) and pids(tmp_path, 1)), *agents)
    os.kill(pids(tmp_path, 1)[0], signal.SIGKILL)
    until(lambda: len(pids(tmp_path, 0)) + len(pids(tmp_path, 1)) == 4, *agents)


@namespaces
def test_the_loss_of_the_node_with_the_store_ends_all_agents(cable: None, start: Start, tmp_path: Path) -> None:
    """So every pod ends with the one of rank 0, and counts as failed."""
    first, second = (start("wait", node, 29400) for node in (0, 1))
    until(lambda: bool(pids(tmp_path, 0) and pids(tmp_path, 1)), first, second)
    found = subprocess.run(["ip", "netns", "pids", NODES[0]], capture_output=True, text=True, check=True).stdout
    for pid in found.split():
        os.kill(int(pid), signal.SIGKILL)
    first.wait()
    assert second.wait(300) == 1
    ip("-n", NODES[0], "link", "show", "wire0")  # the cable was whole
