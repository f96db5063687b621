"""Starts Python programs in copies of a process that has already imported torch, which saves six seconds for each.

`run` and `Popen` take what those of subprocess take. The program runs in a process of its own as always: with its own
arguments, environment, folder, files and signals, and it ends as Python ends. What is not real is the start: tests
that are about imports, threads or launchers use subprocess.
"""

import gc
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

PRELOADED = (
    "PIL.GifImagePlugin",
    "PIL.PngImagePlugin",
    "accelerate",
    "pipeline.training.loop",
    "prometheus_client",
    "s3fs",
    "scipy.special",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "typer",
)
ROOT = str(Path(__file__).resolve().parent.parent)


class Popen(subprocess.Popen[str]):
    """subprocess.Popen for commands that begin with sys.executable, on one thread; text only."""

    def __init__(self, args: Sequence[object], **options: Any) -> None:
        assert args[0] == sys.executable, f"{args[0]} is not {sys.executable}"
        environment = options.get("env") or os.environ
        assert environment.get("OMP_NUM_THREADS", "1") == "1", "the number of threads was fixed when torch was imported"
        super().__init__([str(word) for word in args], text=True, **options)

    def _execute_child(self, args: list[str], *rest: Any) -> None:
        _, _, _, _, cwd, env, _, _, _, *pipes, _, _, _, _, _, new_session, _ = rest
        stdin, _, _, stdout, _, stderr = pipes
        status, copy_end = os.pipe()
        self._status = os.fdopen(status, "rb", buffering=0)
        request = {
            "command": args[1:],
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or os.getcwd()),
            "session": bool(new_session),
        }
        files = [given if given != -1 else standard for standard, given in enumerate((stdin, stdout, stderr))]
        content = json.dumps(request).encode()
        parent = _parent()
        parent.sendall(len(content).to_bytes(4))
        socket.send_fds(parent, [content[:1]], [*files, copy_end])
        parent.sendall(content[1:])
        os.close(copy_end)
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
        self.pid = int.from_bytes(self._status.read(4))
        self._child_created = True

    def _internal_poll(self, *_: object, **__: object) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self._end()
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._end()
        return self.returncode

    def _end(self) -> None:
        answer = self._status.read(4)
        assert len(answer) == 4, "the process that starts programs is gone"
        self.returncode = int.from_bytes(answer, signed=True)
        self._status.close()


def run(
    args: Sequence[object], *, timeout: float | None = None, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and capture what it prints, like subprocess.run."""
    with Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    assert not check or not done.returncode, stderr
    return done


def start_ranks(
    args: Sequence[object], count: int, *, env: dict[str, str], output: Any = subprocess.PIPE
) -> list[Popen]:
    """Start `count` processes of one world, as a launcher would. What they say goes to `output`."""
    if count == 1:
        return [Popen(args, env=env, stdout=output, stderr=output)]
    # Here, because processes that a program starts read this file too, without tests/ on their path.
    from ports import free_port

    port = free_port()
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    place = [{**env, **world, "MASTER_PORT": str(port), "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(count)]
    return [Popen(args, env=one, stdout=output, stderr=output) for one in place]


def run_ranks(
    args: Sequence[object], count: int, *, env: dict[str, str], timeout: float = 240
) -> list[subprocess.CompletedProcess[str]]:
    """Run `count` processes of one world to their ends. Raises AssertionError with all they said when one fails."""
    ranks = start_ranks(args, count, env=env)
    try:
        said = [rank.communicate(timeout=timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(rank.returncode for rank in ranks), "\n".join(
        f"rank {number} ended with {rank.returncode}:\n{out}{errors}"
        for number, (rank, (out, errors)) in enumerate(zip(ranks, said, strict=True))
    )
    return [
        subprocess.CompletedProcess(rank.args, rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)
    ]


@cache
def _parent() -> socket.socket:
    """Start the process whose copies the programs are; return the socket that it listens to."""
    ours, its = socket.socketpair()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.Popen([sys.executable, __file__, str(its.fileno())], pass_fds=[its.fileno()], env=environment)
    its.close()
    return ours


def _serve(parent: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Fork for each request; return it in the copy, and None at the end. Report how every copy ends."""
    waking, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running: dict[int, int] = {}
    while True:
        ready = select.select([parent.fileno(), waking], [], [])[0]
        if waking in ready:
            os.read(waking, 4096)
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            status = running.pop(ended[0])
            with suppress(BrokenPipeError):  # nobody waits for it any more
                os.write(status, os.waitstatus_to_exitcode(ended[1]).to_bytes(4, signed=True))
            os.close(status)
        if parent.fileno() not in ready:
            continue
        if not (head := parent.recv(4, socket.MSG_WAITALL)):
            return None
        first, files, _, _ = socket.recv_fds(parent, 1, 4)
        request = json.loads(first + parent.recv(int.from_bytes(head) - 1, socket.MSG_WAITALL))
        if pid := os.fork():
            os.write(files[3], pid.to_bytes(4))
            running[pid] = files.pop()
            for file in files:
                os.close(file)
            continue
        signal.set_wakeup_fd(-1)
        for file in (parent.detach(), waking, wake, *running.values()):
            os.close(file)
        return request, files


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Run the program that `request` names, as its own process would."""
    for number in signal.valid_signals():
        if number not in (signal.SIGKILL, signal.SIGSTOP) and number < signal.SIGRTMIN:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    if request["session"]:
        os.setsid()
    for standard, file in enumerate(files[:3]):
        os.dup2(file, standard)
    for file in files:
        os.close(file)
    sys.stdin, sys.stdout = os.fdopen(0, "r", closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    random.seed()
    time.tzset()
    kind, *arguments = request["command"]
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
    if kind == "-c":
        sys.argv = ["-c", *arguments[1:]]
        sys.path.insert(0, "")
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = arguments
        sys.path.insert(0, request["cwd"])
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *arguments]
        sys.path.insert(0, str(Path(kind).resolve().parent))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = ROOT
    for name in PRELOADED:
        __import__(name)
    gc.collect()
    gc.freeze()  # a collection in a copy would copy every page
    asked = _serve(socket.socket(fileno=int(sys.argv[1])))
    if asked:
        _become(*asked)
