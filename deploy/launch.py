"""dcgan-launch: what containers start. Runs the trainer's processes, passes signals on, returns the trainer's code.

    dcgan-launch train --data DIR --out RUN       a process for each GPU, or one; `train` is pipeline/train.py
    dcgan-launch --processes 2 train ...          two on this machine
    dcgan-launch --nodes 4 train ...              one of four machines; rank and address are found
    dcgan-launch dcgan-generate ...               any other command: one process

`accelerate launch` and torchrun turn a trainer's exit code 65 into 1 under a traceback, lose or delay SIGTERM,
and as a container's first process ignore it; none of that can be configured away. So this starts the
processes itself, with the environment that they would set: the trainer's own `Accelerator()` reads RANK,
WORLD_SIZE, MASTER_ADDR ..., and ACCELERATE_MIXED_PRECISION, ACCELERATE_USE_CPU and its like as ever.
"""

import ctypes
import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

import pipeline
from pipeline.common.command_line import HELP_OPTIONS, Version, plain_app, run_command
from pipeline.common.errors import UsageError

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SAVED = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # the codes of a trainer that was stopped and has saved
OURS = (2, 65, 69, 75, 78)  # codes that say more than "killed" or "failed"

app = plain_app()


@app.command(context_settings={**HELP_OPTIONS, "allow_interspersed_args": False})
def launch(
    command: Annotated[
        list[str], typer.Argument(help="train, a .py file (run by Python, N times), or a command (run once).")
    ],
    processes: Annotated[int | None, typer.Option(help="Processes on this machine. Default: its GPUs, or 1.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines. Default: PET_NNODES, NNODES, or 1.")] = None,
    node_rank: Annotated[
        int | None, typer.Option(help="Which of them this is. Default: PET_NODE_RANK, ..., JOB_COMPLETION_INDEX.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Host of rank 0. Default: MASTER_ADDR, or pod 0 of this Indexed Job.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port of rank 0. Default: MASTER_PORT, or 29500.")] = None,
    mixed_precision: Annotated[
        str | None, typer.Option("--mixed-precision", "--mixed_precision", help="no, bf16 or fp16, as accelerate's.")
    ] = None,
    grace_seconds: Annotated[
        int, typer.Option(min=1, help="When a process fails, the others are asked to end, and killed after so long.")
    ] = 30,
    version: Version = False,
) -> None:
    """Run COMMAND as one or many processes; exit with its code."""
    from deploy.topology import Topology, count_gpus, discover
    from pipeline.common.machine import available_cores

    options = {"processes": processes, "nodes": nodes, "node_rank": node_rank, "address": address, "port": port}
    program, *rest = command
    if program == "train":
        program = str(Path(pipeline.__file__).with_name("train.py"))
    distributed = program.endswith(".py")
    if not (Path(program).is_file() if distributed else shutil.which(program)):
        raise UsageError(f"{program}: not found; expected train, a .py file, or a command")
    topology = discover(options, os.environ) if distributed else Topology()
    if mixed_precision not in (None, "no", "bf16", "fp16"):
        raise UsageError(f"--mixed-precision {mixed_precision}: expected no, bf16 or fp16")
    shared = {"ACCELERATE_MIXED_PRECISION": mixed_precision} if mixed_precision else {}
    if topology.world_size > 1 and not count_gpus():
        shared["ACCELERATE_USE_CPU"] = os.environ.get("ACCELERATE_USE_CPU", "true")  # without it each runs alone
    # Left alone, every process takes as many threads as the machine has cores, whatever the container's limit.
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, available_cores() // topology.processes)))
    arguments = [*([sys.executable] if distributed else []), program, *rest]
    if topology.nodes > 1:
        print(
            f"dcgan-launch: machine {topology.node_rank} of {topology.nodes}, {topology.processes} processes each, "
            f"rank 0 at {topology.address}:{topology.port}",
            file=sys.stderr,
            flush=True,
        )
    environments = [{**os.environ, **shared, **topology.environment(rank)} for rank in range(topology.processes)]
    sys.exit(supervise(arguments, environments, grace_seconds))


def supervise(arguments: list[str], environments: list[dict[str, str]], grace_seconds: int) -> int:
    """Run one process for each environment until all have ended, and return the code that tells why.

    Also does what is asked of a container's first process: passes signals on and reaps orphans.
    """
    running: dict[int, int] = {}  # process id -> local rank
    ended: list[int] = []  # codes in the order of ending

    def forward(number: int, frame: object) -> None:
        for process in running:
            _signal(process, number)

    def kill(number: int, frame: object) -> None:
        for process in running:
            _signal(process, signal.SIGKILL)

    for number in FORWARDED:
        signal.signal(number, forward)
    signal.signal(signal.SIGALRM, kill)
    # A signal must not come between the start of a process and its entry into the table.
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    for rank, environment in enumerate(environments):
        running[_start(arguments, environment)] = rank
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    while running:
        process, status = os.waitpid(-1, 0)
        if process not in running:
            continue  # an orphan that was handed to us as the first process
        rank = running.pop(process)
        code = os.waitstatus_to_exitcode(status)
        ended.append(code if code >= 0 else 128 - code)
        if ended[-1] not in (0, *SAVED) and running:
            print(f"dcgan-launch: process {rank} ended with code {ended[-1]}; ending the others", file=sys.stderr)
            forward(signal.SIGTERM, None)
            signal.alarm(grace_seconds)
    signal.alarm(0)
    return exit_code(ended)


def exit_code(ended: list[int]) -> int:
    """Return the code that explains most: one of ours, else the first that is not 0.

    Where one process fails, its peers fail a little later, and less to the point.
    """
    failed = [code for code in ended if code]
    return next((code for code in failed if code in OURS), failed[0] if failed else 0)


def _start(arguments: list[str], environment: dict[str, str]) -> int:
    """Start a process in a session of its own, so that Ctrl-C reaches it once: through us. Return its id."""
    process = os.fork()
    if process:
        return process
    try:  # in the child: nothing but what is safe between fork and exec
        os.setsid()
        with suppress(OSError, AttributeError):  # Linux: should we be killed outright, be stopped as well
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        for number in (*FORWARDED, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        os.execvpe(arguments[0], arguments, environment)
    finally:
        os._exit(126)  # the exec failed: found a moment ago, but not a program


def _signal(process: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def main() -> None:
    """Entry point."""
    run_command(app)


if __name__ == "__main__":
    main()
