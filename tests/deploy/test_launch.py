"""dcgan-launch: codes come back, signals go through, no process is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

STAND_IN = Path(__file__).parent / "trainer_stand_in.py"
Start = Callable[..., "subprocess.Popen[str]"]


def events(folder: Path, rank: int = 0) -> list[str]:
    file = folder / f"rank-{rank}"
    return file.read_text().splitlines() if file.exists() else []


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ends_with(process: "subprocess.Popen[str]", code: int) -> str:
    """Check the code of a process that ends, and return what it said on standard error."""
    _, error = process.communicate(timeout=200)
    assert process.returncode == code, error
    return error


@pytest.mark.parametrize("code", [0, 1, 2, 65, 69, 75, 78, 79, 143])
def test_returns_the_trainers_code(start: Start, tmp_path: Path, code: int) -> None:
    process = start("dcgan-launch", STAND_IN, "exit", tmp_path, code)
    assert "Traceback" not in ends_with(process, code)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_forwards_signals_to_every_process(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    process = start("dcgan-launch", "--processes", 2, STAND_IN, "wait", tmp_path)
    wait_until(lambda: len(events(tmp_path, 0)) == len(events(tmp_path, 1)) == 2)
    process.send_signal(number)
    wait_until(lambda: all(f"got {number.name}" in events(tmp_path, rank) for rank in (0, 1)))
    if number == signal.SIGUSR1:  # only passed on: nothing ends
        time.sleep(0.2)
        assert process.poll() is None
    else:
        ends_with(process, 128 + number)
    if number == signal.SIGTERM:
        assert "saved" in events(tmp_path, 0)
        assert "saved" in events(tmp_path, 1)


def test_ctrl_c_leaves_the_process_that_saves_in_peace(start: Start, tmp_path: Path) -> None:
    """The others are done before it; ending with 130 is no failure of theirs."""
    process = start("dcgan-launch", "--processes", 2, STAND_IN, "rank-0-saves", tmp_path)
    wait_until(lambda: len(events(tmp_path, 0)) == len(events(tmp_path, 1)) == 2)
    process.send_signal(signal.SIGINT)
    ends_with(process, 130)
    assert "got SIGTERM" not in events(tmp_path, 0)


@pytest.mark.parametrize(("what", "code"), [("rank-1-fails", 65), ("rank-1-is-killed", 137)])
def test_one_failing_process_ends_the_others(start: Start, tmp_path: Path, what: str, code: int) -> None:
    process = start("dcgan-launch", "--processes", 3, STAND_IN, what, tmp_path)
    error = ends_with(process, code)
    said = "was killed by SIGKILL: out of memory?" if code == 137 else f"exited with code {code}"
    assert f"dcgan-launch: process 1 {said}; stopping the others\n" in error
    assert "saved" in events(tmp_path, 0)
    assert "saved" in events(tmp_path, 2)


def test_processes_that_do_not_end_are_killed(start: Start, tmp_path: Path) -> None:
    process = start("dcgan-launch", "--processes", 2, "--grace-seconds", 1, STAND_IN, "deaf", tmp_path)
    error = ends_with(process, 69)
    assert "dcgan-launch: process 0 did not end in time, and was killed\n" in error
    assert not psutil.pid_exists(int(events(tmp_path, 0)[0].split()[1]))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "was killed by SIGKILL: out of memory?"),
        (signal.SIGSEGV, "was ended by SIGSEGV: a crash inside a library"),
        (signal.SIGHUP, "was ended by SIGHUP"),
    ],
)
def test_what_cannot_say_how_it_ended_is_spoken_for(start: Start, number: signal.Signals, words: str) -> None:
    """Else the log of a pod that was OOMKilled ends without a word."""
    process = start("dcgan-launch", "sh", "-c", f"kill -{number.value} $$")
    assert ends_with(process, 128 + number) == f"dcgan-launch: process 0 {words}\n"


def starts(folder: Path, rank: int = 0) -> int:
    return sum(event.startswith("pid ") for event in events(folder, rank))


def test_passing_faults_start_the_processes_again(start: Start, tmp_path: Path) -> None:
    process = start("dcgan-launch", "--restarts", 3, STAND_IN, "codes", tmp_path, 75, -9, 0)
    error = ends_with(process, 0)
    assert starts(tmp_path) == 3
    assert "dcgan-launch: ended with code 75; starting again in 0 s; 2 restarts left" in error
    assert "dcgan-launch: ended with code 137; starting again in 1 s; 1 restarts left" in error
    assert events(tmp_path)[1::2] == ["", "TORCHELASTIC_RESTART_COUNT=1", "TORCHELASTIC_RESTART_COUNT=2"]


@pytest.mark.parametrize(("restarts", "codes", "code"), [(1, (75, 75, 0), 75), (5, (65, 0), 65), (0, (75, 0), 75)])
def test_there_is_a_bound_and_what_does_not_pass_ends_it(
    start: Start, tmp_path: Path, restarts: int, codes: tuple[int, ...], code: int
) -> None:
    ends_with(start("dcgan-launch", "--restarts", restarts, STAND_IN, "codes", tmp_path, *codes), code)
    assert starts(tmp_path) == codes.count(75) or code == 65


def test_all_processes_of_a_machine_start_again(start: Start, tmp_path: Path) -> None:
    launcher = ("dcgan-launch", "--processes", 2, "--restarts", 1)
    ends_with(start(*launcher, STAND_IN, "codes", tmp_path, 75, 0), 0)
    assert (starts(tmp_path, 0), starts(tmp_path, 1)) == (2, 2)


def test_who_is_stopped_does_not_start_again(start: Start, tmp_path: Path) -> None:
    """Neither while it runs, whatever its code is, nor in the pause."""
    process = start("dcgan-launch", "--restarts", 9, STAND_IN, "codes", tmp_path, 75, 75, 75, 75, 999)
    wait_until(lambda: starts(tmp_path) >= 4)  # and then 4 s of pause
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    before = starts(tmp_path)
    ends_with(process, 143)
    assert starts(tmp_path) == before


def test_who_is_stopped_while_it_runs_does_not_start_again(start: Start, tmp_path: Path) -> None:
    process = start("dcgan-launch", "--restarts", 9, STAND_IN, "codes", tmp_path, 75, 999)
    wait_until(lambda: starts(tmp_path) == 2 and len(events(tmp_path)) == 4)
    process.send_signal(signal.SIGTERM)
    ends_with(process, 143)
    assert starts(tmp_path) == 2


def test_a_killed_launcher_leaves_no_trainer_behind(start: Start, tmp_path: Path) -> None:
    process = start("dcgan-launch", STAND_IN, "wait", tmp_path)
    wait_until(lambda: len(events(tmp_path)) == 2)
    process.kill()
    wait_until(lambda: "saved" in events(tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a process-id namespace")
def test_as_the_first_process_of_a_container(tmp_path: Path) -> None:
    launcher = [str(Path(sys.executable).with_name("dcgan-launch")), str(STAND_IN)]
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", *launcher]
    orphan = subprocess.run([*unshare, "orphan", str(tmp_path)], timeout=200, check=False)
    assert orphan.returncode == 0
    process = subprocess.Popen([*unshare, "wait", str(tmp_path / ".")])
    try:
        wait_until(lambda: len(events(tmp_path)) == 4)
        (first,) = psutil.Process(process.pid).children()
        first.send_signal(signal.SIGTERM)  # the kernel drops it for a first process that has no handler
        assert process.wait(200) == 143
    finally:
        process.kill()
        process.wait()


def test_two_processes_make_one_accelerate_world(start: Start, tmp_path: Path) -> None:
    script = tmp_path / "world.py"
    script.write_text(
        "import sys, torch\n"
        "from accelerate import Accelerator\n"
        "accelerator = Accelerator()\n"
        "ranks = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()\n"
        "if accelerator.is_main_process:\n"
        "    print(accelerator.num_processes, ranks, accelerator.mixed_precision, torch.get_num_threads())\n"
        "accelerator.end_training()\n"
    )
    process = start("dcgan-launch", "--processes", 2, "--mixed_precision", "bf16", script)
    out, error = process.communicate(timeout=240)
    assert (process.returncode, out.strip()) == (0, "2 [0, 1] bf16 1"), error


def entry_point() -> list[str]:
    """Return the image's entry point, with this environment's dcgan-launch."""
    dockerfile = (Path(__file__).parents[2] / "deploy" / "Dockerfile").read_text()
    (found,) = re.findall(r"^ENTRYPOINT (\[.*\])$", dockerfile, re.MULTILINE)
    *before, program = json.loads(found)
    assert program == "dcgan-launch"
    return [*before, str(Path(sys.executable).with_name(program))]


def wait_for_python(process: int) -> None:
    """Return as soon as Python has replaced what started it: long before it has imported anything."""
    name = Path(f"/proc/{process}/cmdline")
    wait_until(lambda: name.read_bytes().startswith(os.fsencode(Path(sys.executable).parent)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_the_very_start_ends_it_before_anything_runs(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen([*entry_point(), STAND_IN, "wait", tmp_path], stderr=subprocess.PIPE, text=True)
    try:
        wait_for_python(process.pid)
        process.send_signal(number)
        _, error = process.communicate(timeout=200)
        assert process.returncode == 128 + number
        assert error == f"stopped: {number.name} came before anything was started\n"
        assert events(tmp_path) == []
    finally:
        process.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a process-id namespace")
def test_the_first_process_of_a_container_loses_no_signal_at_the_start(tmp_path: Path) -> None:
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", *entry_point()]
    process = subprocess.Popen([*unshare, STAND_IN, "wait", tmp_path])
    try:
        wait_until(lambda: bool(psutil.Process(process.pid).children()))
        (first,) = psutil.Process(process.pid).children()
        wait_for_python(first.pid)
        first.send_signal(signal.SIGTERM)
        assert process.wait(200) == 143
        assert events(tmp_path) == []
    finally:
        process.kill()
        process.wait()


def test_tasks_of_a_scheduler_that_train_alone_are_told_so(start: Start, tmp_path: Path) -> None:
    process = start("dcgan-launch", STAND_IN, "exit", tmp_path, 0, env={"SLURM_NTASKS": "2"})
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0
    assert "dcgan-launch: SLURM_NTASKS=2, but" in error


def test_what_kubeflow_trainer_sets_makes_one_run_of_two_pods(start: Start, tmp_path: Path) -> None:
    """As its controller of version 2.3 gives it to the containers `node` of a TrainJob of two nodes."""
    (tmp_path / "pods").mkdir()
    for pod in range(2):
        variables = {
            "PET_NNODES": "2",
            "PET_NPROC_PER_NODE": "2",
            "PET_NODE_RANK": str(pod),
            "PET_MASTER_ADDR": "train-node-0-0.train",
            "PET_MASTER_PORT": "29500",
            "JOB_COMPLETION_INDEX": str(pod),
        }
        ends_with(start("dcgan-launch", "--nodes=2", STAND_IN, "exit", tmp_path / "pods", 0, env=variables), 0)
    assert [events(tmp_path / "pods", rank)[1] for rank in range(4)] == [
        f"WORLD_SIZE=4 RANK={rank} LOCAL_RANK={rank % 2} MASTER_ADDR=train-node-0-0.train MASTER_PORT=29500"
        for rank in range(4)
    ]


def test_any_command_runs_once_whatever_the_environment_says(start: Start) -> None:
    process = start("dcgan-launch", "sh", "-c", "echo $RANK.; exit 3", env={"PET_NNODES": "4", "PET_NODE_RANK": "1"})
    assert process.communicate(timeout=200)[0] == ".\n"
    assert process.returncode == 3


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nosuchcommand"], 2, "not found"),
        (["nosuch.py"], 2, "not found"),
        (["--nodes", 2, STAND_IN], 78, "which one is this"),
        (["--nodes", 2, "--node-rank", 2, STAND_IN], 78, "0 to 1"),
        (["--nodes", "two", STAND_IN], 2, "--nodes"),
        (["--mixed-precision", "fp8", STAND_IN], 2, "fp8"),
    ],
)
def test_mistakes_are_one_line(start: Start, arguments: list[object], code: int, words: str) -> None:
    process = start("dcgan-launch", *arguments)
    _, error = process.communicate(timeout=200)
    assert process.returncode == code, error
    assert words in error
    assert "Traceback" not in error
