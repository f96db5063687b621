"""dcgan-launch: the program of containers. Runs the trainer's processes, forwards signals, returns the exit code.

    dcgan-launch train --data DIR --out RUN       a process for each GPU, or one; `train` is pipeline/train.py
    dcgan-launch --processes 2 train ...          two on this machine
    dcgan-launch --nodes 4 train ...              one of four machines; finds its rank and the address
    srun --ntasks-per-node=1 dcgan-launch train ...      one of those that Slurm gave to the job
    dcgan-launch --restarts 100 train ...         starts them again, here, when one was killed or lost a peer
    dcgan-launch dcgan-generate ...               any other command: one process

`accelerate launch` and torchrun turn a trainer's exit code 65 into 1 under a traceback. They lose or delay SIGTERM,
and ignore it as a container's first process. No option changes that, so this program starts the processes itself, in
the environment that accelerate would set: the trainer's `Accelerator()` reads RANK, WORLD_SIZE, MASTER_ADDR, ...,
ACCELERATE_MIXED_PRECISION and ACCELERATE_USE_CPU as usual.
"""

import ctypes
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

import pipeline
from pipeline.common.command_line import HELP_OPTIONS, Version, plain_app
from pipeline.common.errors import UsageError

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
AWAITED = (*FORWARDED, signal.SIGCHLD, signal.SIGALRM)
SAVED = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # exit codes of a trainer that saved after a signal
CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
PASSING = (75, *(128 + number for number in (signal.SIGKILL, *CRASHES)))
OURS = (2, 65, 69, 75, 78, 79)  # exit codes of our programs, which say more than "killed" or "failed"

LONGEST_PAUSE_SECONDS = 8.0
LONG_SECONDS = 60.0
"""Processes that ran for so long are started again at once; those that did not, after a pause that doubles."""

app = plain_app()


@app.command(context_settings={**HELP_OPTIONS, "allow_interspersed_args": False})
def launch(
    command: Annotated[
        list[str], typer.Argument(help="train, a .py file (both run as N processes), or any other command (run once).")
    ],
    processes: Annotated[int | None, typer.Option(help="Processes on this machine. Default: its GPUs, or 1.")] = None,
    nodes: Annotated[
        int | None, typer.Option(help="Number of machines. Default: PET_NNODES, NNODES, those of the Slurm step, or 1.")
    ] = None,
    node_rank: Annotated[
        int | None,
        typer.Option(help="Rank of this machine. Default: PET_NODE_RANK, ..., JOB_COMPLETION_INDEX, Slurm."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Host of rank 0. Default: MASTER_ADDR, pod 0 of this Indexed Job, Slurm's first node."),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port of rank 0. Default: MASTER_PORT, or 29500.")] = None,
    mixed_precision: Annotated[
        str | None, typer.Option("--mixed-precision", "--mixed_precision", help="no, bf16 or fp16, as in accelerate.")
    ] = None,
    grace_seconds: Annotated[
        int, typer.Option(min=1, help="After one process fails, the others get SIGTERM, and SIGKILL after this time.")
    ] = 30,
    restarts: Annotated[
        int,
        typer.Option(min=0, help="How often to start all processes again, here, after a passing fault (75) or a kill."),
    ] = 0,
    version: Version = False,
) -> None:
    """Run COMMAND as one or more processes, and exit with its code."""
    from deploy.topology import Topology, count_gpus, discover, overlooked_tasks
    from pipeline.common.machine import available_cores

    options = {"processes": processes, "nodes": nodes, "node_rank": node_rank, "address": address, "port": port}
    program, *rest = command
    if program == "train":
        program = str(Path(pipeline.__file__).with_name("train.py"))
    distributed = program.endswith(".py")
    if not (Path(program).is_file() if distributed else shutil.which(program)):
        raise UsageError(f"{program}: not found; expected train, a .py file, or a command")
    topology = discover(options, os.environ) if distributed else Topology()
    if distributed and (warning := overlooked_tasks(topology, options, os.environ)):
        print(f"dcgan-launch: {warning}", file=sys.stderr, flush=True)
    if mixed_precision not in (None, "no", "bf16", "fp16"):
        raise UsageError(f"--mixed-precision {mixed_precision}: expected no, bf16 or fp16")
    shared = {"ACCELERATE_MIXED_PRECISION": mixed_precision} if mixed_precision else {}
    if topology.world_size > 1 and not count_gpus():
        shared["ACCELERATE_USE_CPU"] = os.environ.get("ACCELERATE_USE_CPU", "true")  # else each trains alone
    # By default every process takes a thread for each core of the machine, whatever the container's limit.
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, available_cores() // topology.processes)))
    arguments = [*([sys.executable] if distributed else []), program, *rest]
    if topology.nodes > 1 and topology.local_ranks[0] == 0:
        print(
            f"dcgan-launch: machine {topology.node_rank} of {topology.nodes}, {topology.processes} processes each, "
            f"rank 0 at {topology.address}:{topology.port}",
            file=sys.stderr,
            flush=True,
        )
    environments = [{**os.environ, **shared, **topology.environment(rank)} for rank in topology.local_ranks]
    sys.exit(keep_running(arguments, environments, grace_seconds, restarts))


def keep_running(arguments: list[str], environments: list[dict[str, str]], grace_seconds: int, restarts: int) -> int:
    """Run the processes, again after a passing fault, at most `restarts` times; return the code of the last ones.

    So the ranks that are well stay on their machines when one is lost, which its scheduler replaces: they look up the
    address of rank 0 anew, meet, and resume from the last checkpoint.
    """
    pause, count = 0.0, 0
    while True:
        began = time.monotonic()
        code, stop = supervise(arguments, environments, grace_seconds)
        if stop or code not in PASSING or count == restarts:
            return code
        count += 1
        environments = [{**known, "TORCHELASTIC_RESTART_COUNT": str(count)} for known in environments]
        if time.monotonic() - began > LONG_SECONDS:
            pause = 0.0
        print(
            f"dcgan-launch: ended with code {code}; starting again in {pause:.0f} s; {restarts - count} restarts left",
            file=sys.stderr,
            flush=True,
        )
        if heard := _pause(pause):
            return 128 + heard
        pause = min(max(1.0, 2 * pause), LONGEST_PAUSE_SECONDS)


def _pause(seconds: float) -> int:
    """Wait; return the signal that asked to stop meanwhile, else 0. What else came has nobody to go to any more."""
    deadline = time.monotonic() + seconds
    while True:
        heard = signal.sigtimedwait(AWAITED, max(0.0, deadline - time.monotonic()))
        if heard is None:
            return 0
        if heard.si_signo in STOPS:
            return heard.si_signo


def supervise(arguments: list[str], environments: list[dict[str, str]], grace_seconds: int) -> tuple[int, int]:
    """Run one process for each environment until all have exited.

    Returns the exit code that explains most, and the signal that asked them to stop, 0 if none did.

    This also does the duty of a container's first process: it forwards signals and reaps orphans.
    """
    running: dict[int, int] = {}  # process id -> local rank
    ended: list[int] = []  # exit codes in the order of exit
    armed, killed, stop = False, False, 0

    def send(number: int) -> None:
        for process in running:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    # Signals wait until they are asked for. A handler would run between two instructions of Python: a signal that
    # comes between the last one and a blocking call is noticed only when that call ends.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # an ignored one would never come
    signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
    for rank, environment in enumerate(environments):
        running[_start(arguments, environment)] = rank
    while running:
        number = signal.sigwait(AWAITED)
        if number == signal.SIGALRM:
            killed = True
            send(signal.SIGKILL)
        elif number != signal.SIGCHLD:
            stop = number if number in STOPS else stop
            send(number)
        while running:  # one SIGCHLD may stand for several processes
            process, status = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                break
            if process not in running:
                continue  # an orphan, which the kernel gives to the first process
            rank = running.pop(process)
            code = os.waitstatus_to_exitcode(status)
            ended.append(code if code >= 0 else 128 - code)
            failed = ended[-1] not in (0, *SAVED)
            if failed and (running or code < 0):  # of its own end a process says more than we can
                said = _how_it_ended(code, killed) + ("; stopping the others" if running else "")
                print(f"dcgan-launch: process {rank} {said}", file=sys.stderr, flush=True)
            if failed and running:
                send(signal.SIGTERM)
                if not armed:  # once: a process that fails later must not prolong the grace of those that hang
                    signal.alarm(grace_seconds)
                    armed = True
    signal.alarm(0)
    return exit_code(ended), stop


def _how_it_ended(code: int, killed: bool) -> str:
    """Return words for the end of a process; `killed` by us, or else by the kernel, which leaves none in its log."""
    if code >= 0:
        return f"exited with code {code}"
    by = signal.Signals(-code)
    if by == signal.SIGKILL:
        return "did not end in time, and was killed" if killed else "was killed by SIGKILL: out of memory?"
    return f"was ended by {by.name}" + (": a crash inside a library" if by in CRASHES else "")


def exit_code(ended: list[int]) -> int:
    """Return the code that explains most: the first of ours, else the first that is not 0.

    When one process fails, its peers fail a little later, with codes that explain less.
    """
    failed = [code for code in ended if code]
    return next((code for code in failed if code in OURS), failed[0] if failed else 0)


def _start(arguments: list[str], environment: dict[str, str]) -> int:
    """Start a process in its own session, so that Ctrl-C reaches it once, through us. Return its id."""
    process = os.fork()
    if process:
        return process
    try:  # in the child: only what is safe between fork and exec
        os.setsid()
        with suppress(OSError, AttributeError):  # Linux: SIGTERM for the child if we are killed
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        for number in AWAITED:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, AWAITED)
        os.execvpe(arguments[0], arguments, environment)
    finally:
        os._exit(126)  # the exec failed: the file exists, but is no program
