"""What Slurm tells a task that srun started: how many machines, which one this is, and the name of the first."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.common.errors import ConfigConflict, UsageError

PORTS = range(20_000, 30_000)
"""Those of jobs, by their number: jobs that share a machine must not meet at one port."""
MOST_HOSTS = 100_000


@dataclass(frozen=True)
class Step:
    """The place of a task in its job step."""

    tasks: int
    """Tasks on each machine. More than one: each is one process of a run."""
    task: int
    """Which of them this is, from 0."""
    found: dict[str, tuple[str, str]]
    """What it says of nodes, node_rank, address, port, and of processes where tasks are processes: value, variable."""


def read_step(environment: Mapping[str, str]) -> Step | None:
    """Return the place of this task, None outside `srun`: a batch script runs once, whatever its job has.

    Raises ConfigConflict when the machines have different numbers of tasks; UsageError for what is no list of hosts.
    """
    if "SLURM_STEP_ID" not in environment or "SLURM_NODEID" not in environment:
        return None
    names = {
        "nodes": ("SLURM_STEP_NUM_NODES", "SLURM_NNODES"),
        "tasks": ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
        "hosts": ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"),
    }
    set_ = {what: next((name for name in those if environment.get(name)), "") for what, those in names.items()}
    if not all(set_.values()):
        return None
    nodes, tasks, hosts = (environment[name] for name in set_.values())
    counts = re.fullmatch(r"(\d+)(\(x\d+\))?", tasks)
    if counts is None:
        raise ConfigConflict(f"{set_['tasks']}={tasks}: expected as many tasks on each machine; use --ntasks-per-node")
    if nodes == "1" and counts[1] == "1":
        return None
    found = {
        "nodes": (nodes, set_["nodes"]),
        "node_rank": (environment["SLURM_NODEID"], "SLURM_NODEID"),
        "address": (expand_hosts(hosts, set_["hosts"])[0], set_["hosts"]),
    }
    if (job := environment.get("SLURM_JOB_ID", "")).isdigit():
        found["port"] = str(PORTS[int(job) % len(PORTS)]), "SLURM_JOB_ID"
    if counts[1] != "1":
        found["processes"] = counts[1], set_["tasks"]
    return Step(int(counts[1]), int(environment.get("SLURM_LOCALID", "0")), found)


def expand_hosts(text: str, where: str = "host list") -> list[str]:
    """Return the hosts of Slurm's list in its order, as `scontrol show hostnames` does.

    `n[01-03,7],gpu-a[1-2]b` is n01, n02, n03, n7, gpu-a1b, gpu-a2b. Names may have several brackets.

    Raises UsageError for anything else, and for more than MOST_HOSTS.
    """
    hosts: list[str] = []
    for entry in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        hosts += _expand(entry, where)
        if len(hosts) > MOST_HOSTS:
            raise UsageError(f"{where}: more than {MOST_HOSTS} hosts")
    if not hosts or not re.fullmatch(r"((^|,)(?:[^,\[\]]|\[[^\[\]]+\])+)+", text):
        raise UsageError(f"{where}={text}: expected hosts as in n[01-03,7],login")
    return hosts


def _expand(entry: str, where: str) -> list[str]:
    before, bracket, rest = entry.partition("[")
    if not bracket:
        return [entry]
    inside, _, after = rest.partition("]")
    numbers: list[str] = []
    for part in inside.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or int(match[2] or match[1]) - int(match[1]) not in range(MOST_HOSTS):
            raise UsageError(f"{where}: [{inside}] is no list of numbers such as [01-03,7]")
        low, high = int(match[1]), int(match[2] or match[1])
        numbers += [f"{number:0{len(match[1])}d}" for number in range(low, high + 1)]
    tails = _expand(after, where)
    return [before + number + tail for number in numbers for tail in tails]
