"""The topology of a run: machines, processes and rank, from options and from the variables that schedulers set."""

import ctypes
import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from deploy.slurm_step import read_step
from pipeline.common.errors import ConfigConflict, UsageError

PORT = 29500

# The variables of each value, by scheduler: Kubeflow Trainer sets PET_*, torchrun its own names, the PyTorchJob
# operator RANK and WORLD_SIZE (which count machines there), an Indexed Job its completion index. The first one that
# is set counts. Slurm's come last, and together: slurm_step.py.
_NAMES = {
    "nodes": ("PET_NNODES", "NNODES", "WORLD_SIZE"),
    "node_rank": ("PET_NODE_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "JOB_COMPLETION_INDEX"),
    "processes": ("PET_NPROC_PER_NODE", "NPROC_PER_NODE"),
    "address": ("PET_MASTER_ADDR", "MASTER_ADDR"),
    "port": ("PET_MASTER_PORT", "MASTER_PORT"),
}

# The variables by which schedulers tell a task how many tasks there are.
_TASKS = ("SLURM_NNODES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True)
class Topology:
    """The place of one machine and its processes among all."""

    nodes: int = 1
    """Number of machines."""
    node_rank: int = 0
    """Rank of this machine, from 0."""
    processes: int = 1
    """Processes on each machine."""
    address: str = "127.0.0.1"
    """Host of rank 0."""
    port: int = PORT
    task: int | None = None
    """The one process of this machine to start, where the scheduler starts a task for each; None: all of them."""

    @property
    def local_ranks(self) -> range:
        """Ranks, among those of this machine, of the processes to start."""
        return range(self.processes) if self.task is None else range(self.task, self.task + 1)

    @property
    def world_size(self) -> int:
        """Number of processes on all machines."""
        return self.nodes * self.processes

    def environment(self, local_rank: int) -> dict[str, str]:
        """Return the variables that torch.distributed and accelerate read in a process; none if it is the only one."""
        if self.world_size == 1:
            return {}
        return {
            "RANK": str(self.node_rank * self.processes + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.processes),
            "GROUP_RANK": str(self.node_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def count_gpus() -> int:
    """Return the number of NVIDIA GPUs that this process may use. Asks the driver: importing torch takes seconds."""
    with suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
    return 0


def discover(
    options: Mapping[str, int | str | None],
    environment: Mapping[str, str],
    *,
    hostname: Callable[[], str] = socket.getfqdn,
    devices: Callable[[], int] = count_gpus,
) -> Topology:
    """Return the topology that `options` (nodes, node_rank, processes, address, port) and the environment give.

    Raises UsageError for a value that is not a number, ConfigConflict when the numbers contradict each other.
    """
    if "LOCAL_RANK" in environment:
        raise ConfigConflict("LOCAL_RANK is set: another launcher runs this already; start the trainer itself")
    found: dict[str, tuple[str, str]] = {}  # value's name -> (value, option or variable)
    for what, names in _NAMES.items():
        if options.get(what) is not None:
            found[what] = str(options[what]), f"--{what.replace('_', '-')}"
        elif name := next((name for name in names if environment.get(name)), None):
            found[what] = environment[name], name
    gpus = devices()
    task = None
    if "nodes" not in found and (step := read_step(environment)) is not None:
        for what, value in step.found.items():
            found.setdefault(what, value)
        if step.tasks > 1:
            task = step.task
            if found["processes"][0] != str(step.tasks):
                raise ConfigConflict(
                    f"{found['processes'][1]}={found['processes'][0]}, but Slurm starts {step.tasks} tasks on each "
                    "machine, and each is one process; start one task on each: srun --ntasks-per-node=1"
                )
            if 0 < gpus < step.tasks:
                raise ConfigConflict(
                    f"{step.tasks} tasks on a machine, and this one sees {gpus} GPUs: a process needs all of its "
                    "machine's; start one task on each machine: srun --ntasks-per-node=1 --gpus-per-node=N"
                )

    def number(what: str, default: int, low: int) -> int:
        value, where = found.get(what, (str(default), ""))
        if what == "processes" and value in ("auto", "gpu", "cpu"):  # torchrun accepts these words
            return max(1, gpus) if value != "cpu" else 1
        if not value.isdigit() or int(value) < low:
            raise UsageError(f"{where}={value}: expected a whole number from {low}")
        return int(value)

    nodes, processes = number("nodes", 1, 1), number("processes", max(1, gpus), 1)
    if nodes == 1 and task is None:
        return Topology(processes=processes, port=number("port", PORT, 1) if "port" in found else free_port())
    if "node_rank" not in found:
        raise ConfigConflict(
            f"{found['nodes'][1]}={nodes} machines, but which one is this? Set --node-rank or NODE_RANK"
        )
    rank = number("node_rank", 0, 0)
    if rank >= nodes:
        raise ConfigConflict(
            f"{found['node_rank'][1]}={rank}, but {found['nodes'][1]}={nodes}: ranks count from 0 to {nodes - 1}"
        )
    address = found["address"][0] if "address" in found else first_host(hostname(), rank)
    return Topology(nodes, rank, processes, address, number("port", PORT, 1), task)


def overlooked_tasks(topology: Topology, options: Mapping[str, object], environment: Mapping[str, str]) -> str:
    """Return a warning where a scheduler started several tasks and each would make a run of its own; else "".

    MPI does not say where rank 0 listens, so the machines have to be named; Slurm does, to what srun starts.
    `--nodes 1` says that it is meant. As many tasks as processes are taken for the room that was asked for.
    """
    if topology.nodes > 1 or topology.task is not None or options.get("nodes") is not None:
        return ""
    for name in _TASKS:
        tasks = int(environment[name]) if environment.get(name, "").isdigit() else 1
        if tasks > 1 and (tasks != topology.processes or name == "SLURM_NNODES"):
            return (
                f"{name}={tasks}, but what starts here does not know of the others: if each of them starts "
                "dcgan-launch, each makes a run of its own. For one run start one task on each machine (Slurm: srun "
                "--ntasks-per-node=1 dcgan-launch ...; others: --nodes N --node-rank i --address HOST). If this is to "
                "be a run of its own: --nodes 1"
            )
    return ""


def first_host(host: str, rank: int) -> str:
    """Return the name of the pod with index 0, given this pod's: `train-3.ranks.ns.svc` gives `train-0.ranks.ns.svc`.

    Raises ConfigConflict when `host` does not end in `-rank`, as hosts of an Indexed Job do.
    """
    name, dot, domain = host.partition(".")
    base, found = re.subn(rf"-{rank}$", "-0", name)
    if not found:
        raise ConfigConflict(
            f"several machines, but no address: set --address or MASTER_ADDR (this host, {host}, "
            f"is not named like pod {rank} of an Indexed Job)"
        )
    return base + dot + domain
