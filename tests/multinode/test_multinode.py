"""Two nodes, as two network namespaces joined by one cable: training, a cut cable, a lost node, gang restarts.

`make test-multinode`; needs root (`ip netns`), so it is no part of `make test`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, TINY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None,
        reason="needs root, and iproute2 (`make system` installs it), for network namespaces",
    ),
]

NODES = ("dcgan-node0", "dcgan-node1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
OPTIONS = (
    "schedule.log_every_images=32",
    "schedule.checkpoint_every_images=320",
    "schedule.evaluate_samples=64",
    "runtime.step_timeout_seconds=8",
)


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True)


@pytest.fixture
def cable() -> Iterator[None]:
    """Two namespaces with one veth pair between them."""
    for node in NODES:
        ip("netns", "del", node, check=False)
        ip("netns", "add", node)
    ip("link", "add", "wire0", "netns", NODES[0], "type", "veth", "peer", "name", "wire1", "netns", NODES[1])
    for index, node in enumerate(NODES):
        ip("-n", node, "addr", "add", f"{ADDRESSES[index]}/24", "dev", f"wire{index}")
        ip("-n", node, "link", "set", f"wire{index}", "up")
        ip("-n", node, "link", "set", "lo", "up")
    yield
    for node in NODES:
        ip("netns", "del", node, check=False)


def start(
    node: int, data: Path, out: Path, *overrides: str, restarts: int = 0, told_by: str = "options"
) -> subprocess.Popen[str]:
    """Start one node's launcher inside its namespace, in a process group of its own.

    `told_by`: options, or the variables that Kubeflow Trainer gives to the pods of a TrainJob.
    """
    launch = str(Path(sys.executable).parent / "dcgan-launch")
    command = ["ip", "netns", "exec", NODES[node], launch, "--restarts", str(restarts), "--grace-seconds", "10"]
    place = {"--nodes": "2", "--node-rank": str(node), "--processes": "1", "--address": ADDRESSES[0], "--port": "29517"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= {"GLOO_SOCKET_IFNAME": f"wire{node}"}
    if told_by == "options":
        command += [word for pair in place.items() for word in pair]
    else:
        names = ("PET_NNODES", "PET_NODE_RANK", "PET_NPROC_PER_NODE", "PET_MASTER_ADDR", "PET_MASTER_PORT")
        environment |= dict(zip(names, place.values(), strict=True))
    command += ["train", "--data", str(data), "--out", str(out), *TINY, *OPTIONS, *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(processes: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str]]:
    """Wait for all nodes; return their codes and messages."""
    deadline = time.monotonic() + seconds
    ends = []
    try:
        for process in processes:
            _, errors = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            ends.append((process.returncode, errors))
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return ends


def wait_for_checkpoints(out: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Wait until the run has saved twice: from the first is known how long one takes, and so when it hangs."""
    for _ in range(1200):
        if len(list(out.glob("checkpoints/*/state.json"))) > 1:
            return
        assert all(process.poll() is None for process in processes), [p.communicate()[1] for p in processes]
        time.sleep(0.1)
    raise AssertionError("no two checkpoints in two minutes")


def train_together(data: Path, out: Path, total: int, *, told_by: str = "options") -> None:
    total_images = f"schedule.total_images={total}"
    ends = finish([start(node, data, out, total_images, told_by=told_by) for node in (0, 1)], 200)
    assert [code for code, _ in ends] == [0, 0], ends
    state = json.loads((out / "checkpoints" / f"{total:012d}" / "state.json").read_text())
    assert state["world_size"] == 2


@pytest.mark.parametrize("told_by", ["options", "kubeflow trainer"])
def test_two_nodes_train(cable: None, faces32: Path, tmp_path: Path, told_by: str) -> None:
    train_together(faces32, tmp_path / "run", 640, told_by=told_by)


@pytest.mark.parametrize("accident", ["cut cable", "lost node 1", "lost node 0"])
def test_an_accident_ends_both_and_the_gang_restart_goes_on(
    cable: None, faces32: Path, tmp_path: Path, accident: str
) -> None:
    out = tmp_path / "run"
    processes = [start(node, faces32, out, "schedule.total_images=1000000") for node in (0, 1)]
    wait_for_checkpoints(out, processes)
    begin = time.monotonic()
    survivors = processes
    if accident == "cut cable":
        ip("-n", NODES[0], "link", "set", "wire0", "down")
    else:
        lost = int(accident[-1])
        pids = subprocess.run(["ip", "netns", "pids", NODES[lost]], capture_output=True, text=True, check=True).stdout
        for pid in pids.split():  # at once: a trainer that outlives its launcher would stop in good order
            os.kill(int(pid), signal.SIGKILL)
        processes[lost].communicate()
        survivors = [processes[1 - lost]]
    ends = finish(survivors, 90)
    assert time.monotonic() - begin < 90
    assert all(code == 75 for code, _ in ends), ends
    assert all("from the last checkpoint" in errors for _, errors in ends), ends
    assert all("Traceback" not in errors for _, errors in ends), ends
    ip("-n", NODES[0], "link", "set", "wire0", "up")
    saved = int(sorted(out.glob("checkpoints/*/state.json"))[-1].parent.name)
    train_together(faces32, out, saved + 320)


@pytest.mark.parametrize("lost", [1, 0])
def test_the_node_that_is_well_stays_when_the_other_is_replaced_again_and_again(
    cable: None, faces32: Path, tmp_path: Path, lost: int
) -> None:
    out, total = tmp_path / "run", "schedule.total_images=1000000"
    processes = [start(node, faces32, out, total, restarts=5) for node in (0, 1)]
    seconds = []
    try:
        wait_for_checkpoints(out, processes)
        for _ in range(3):
            pids = subprocess.run(["ip", "netns", "pids", NODES[lost]], capture_output=True, text=True, check=True)
            for pid in pids.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            processes[lost].communicate()
            begin = time.monotonic()
            seen = len((out / "log.txt").read_text().split("resuming at image"))
            processes[lost] = start(lost, faces32, out, total, restarts=5)
            while len((out / "log.txt").read_text().split("resuming at image")) == seen:
                assert time.monotonic() - begin < 120
                assert processes[1 - lost].poll() is None, processes[1 - lost].communicate()
                time.sleep(0.1)
            seconds.append(time.monotonic() - begin)
        print(f"seconds from the replacement of node {lost} to the resumed run: {seconds}")
        for process in processes:
            process.send_signal(signal.SIGTERM)
        ends = finish(processes, 60)
        assert [code for code, _ in ends] == [143, 143], ends
        assert ends[1 - lost][1].count("dcgan-launch: ended with code 75; starting again") == 3
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
