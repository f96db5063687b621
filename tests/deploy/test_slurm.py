"""Slurm's variables: lists of hosts, and the place of a task."""

import os
import subprocess
from pathlib import Path

import pytest
from support import ROOT

from deploy.slurm_step import expand_hosts
from deploy.topology import Topology, discover, overlooked_tasks
from pipeline.common.errors import ConfigConflict, UsageError
from pipeline.common.partition import Partition, parse_partition


def step(tasks: str = "1(x4)", node: int = 2, task: int = 0, nodes: int = 4) -> dict[str, str]:
    """Return what `srun` sets in a task, as far as we read it."""
    return {
        "SLURM_JOB_ID": "41234",
        "SLURM_STEP_ID": "0",
        "SLURM_NNODES": "9",
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(task),
        "SLURM_NTASKS": "8",
        "SLURM_TASKS_PER_NODE": "7(x9)",
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_JOB_NODELIST": "a[1-9]",
        "SLURM_STEP_NODELIST": "gpu[07-10]",
    }


def place(environment: dict[str, str], gpus: int = 0, **options: int | str) -> Topology:
    return discover(options, environment, hostname=lambda: "localhost", devices=lambda: gpus)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("n[01-03,7],gpu-a[1-2]b", ["n01", "n02", "n03", "n7", "gpu-a1b", "gpu-a2b"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("rack[0-1]node[1,3]", ["rack0node1", "rack0node3", "rack1node1", "rack1node3"]),
        ("b,a[2]", ["b", "a2"]),
        ("n[0000-0001].cluster.example", ["n0000.cluster.example", "n0001.cluster.example"]),
    ],
)
def test_lists_of_hosts_are_expanded_in_their_order(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "n[1-", "n[a-b]", "n[3-1]", "n[1-9999999999]", "n[]", "a,,b", "n]", "n[[1]]"])
def test_what_is_no_list_of_hosts_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        expand_hosts(text)


def test_one_task_on_each_machine_starts_a_process_for_each_gpu() -> None:
    found = place(step(), gpus=8)
    assert found == Topology(4, 2, 8, "gpu07", 21234)
    assert found.local_ranks == range(8)
    assert overlooked_tasks(found, {}, step()) == ""


def test_tasks_that_are_processes_start_one_each() -> None:
    environment = step("2(x4)", task=1)
    found = place(environment)
    assert list(found.local_ranks) == [1]
    assert found.environment(1) == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "2",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "21234",
    }
    assert overlooked_tasks(found, {}, environment) == ""
    one_machine = place(step("2", node=0, nodes=1))
    assert (one_machine.world_size, one_machine.port) == (2, 21234), "a port that both know"


def test_options_and_other_variables_win() -> None:
    assert place(step(), nodes=1).world_size == 1
    assert place({**step(), "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"}) == Topology(4, 2, 1, "10.0.0.1", 5)
    mpi = {**step(), "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "there"}
    assert place(mpi) == Topology(2, 1, 1, "there", 29500)


def test_a_batch_script_and_a_single_task_run_alone() -> None:
    batch = {name: value for name, value in step().items() if "STEP" not in name}
    assert place(batch).world_size == 1
    assert "srun --ntasks-per-node=1 dcgan-launch" in overlooked_tasks(place(batch), {}, batch)
    assert place(step("1", node=0, nodes=1)).world_size == 1


@pytest.mark.parametrize(
    ("environment", "options", "gpus", "words"),
    [
        (step("3,1"), {}, 0, "SLURM_STEP_TASKS_PER_NODE=3,1: expected as many tasks on each machine"),
        (step("2(x4)"), {"processes": 4}, 0, "--processes=4, but Slurm starts 2 tasks"),
        (step("4(x4)"), {}, 1, "4 tasks on a machine, and this one sees 1 GPUs"),
    ],
)
def test_contradictions_are_named(environment: dict[str, str], options: dict[str, int], gpus: int, words: str) -> None:
    with pytest.raises(ConfigConflict) as raised:
        place(environment, gpus, **options)
    assert words in str(raised.value)


def test_an_array_job_names_the_part() -> None:
    assert parse_partition("4", {"SLURM_ARRAY_TASK_ID": "3"}) == Partition(3, 4)
    assert parse_partition("4", {"SLURM_ARRAY_TASK_ID": "3", "JOB_COMPLETION_INDEX": "1"}) == Partition(1, 4)
    with pytest.raises(UsageError, match="parts count from 0"):
        parse_partition("4", {"SLURM_ARRAY_TASK_ID": "4"})
    with pytest.raises(UsageError, match="JOB_COMPLETION_INDEX or SLURM_ARRAY_TASK_ID"):
        parse_partition("4", {})


SBATCH = """#!/bin/sh
printf '%s\\n' "$*" >> "$CALLS"
echo "$(wc -l < "$CALLS");cluster"
"""


def submit(folder: Path, *arguments: object) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Submit steps to a stand-in of sbatch; return what the script said and what each job was asked for."""
    program, calls = folder / "sbatch", folder / "calls"
    program.write_text(SBATCH)
    program.chmod(0o755)
    settings = (ROOT / "deploy/slurm/settings.sh").read_text()
    (folder / "mine.sh").write_text(settings.replace("PATH=/shared/dcgan/.venv/bin:$PATH", ""))
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls)}
    command = [str(ROOT / "deploy/slurm/submit.sh"), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_each_step_waits_for_the_one_before_it(tmp_path: Path) -> None:
    done, calls = submit(tmp_path, "mine.sh")
    assert done.returncode == 0, done.stderr
    steps = ["data", "data-merge", "train", "export", "generate", "generate-merge"]
    assert done.stdout.splitlines() == [f"{step}: job {number}" for number, step in enumerate(steps, 1)]
    assert [Path(call.split()[-1]).stem for call in calls] == steps
    assert "--dependency" not in calls[0]
    assert all(f"--dependency=afterok:{number} " in call for number, call in enumerate(calls[1:], 1))
    assert [("--array=0-3 " in call) for call in calls] == [True, False, False, False, True, False]
    assert "--nodes=2" in calls[2]


def test_single_steps_and_mistakes(tmp_path: Path) -> None:
    assert [Path(call.split()[-1]).stem for call in submit(tmp_path, "mine.sh", "export")[1]] == ["export"]
    (tmp_path / "calls").unlink()
    for arguments, words in (
        ((), "submit.sh SETTINGS"),
        (("no.sh",), "no.sh: no such file"),
        (("mine.sh", "x"), "x: no"),
    ):
        done, calls = submit(tmp_path, *arguments)
        assert (done.returncode, calls) == (2, [])
        assert words in done.stderr


@pytest.mark.parametrize("script", sorted((ROOT / "deploy/slurm").iterdir()), ids=lambda path: path.name)
def test_job_scripts_are_shell_that_saves_before_the_time_limit(script: Path) -> None:
    subprocess.run(["sh", "-n", str(script)], check=True)
    if script.suffix == ".sbatch":
        assert {"#SBATCH --requeue", "#SBATCH --signal=TERM@120"} < set(script.read_text().splitlines())
