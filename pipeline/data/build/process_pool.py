"""A pool of processes that stop when their parent ends, even when it is killed."""

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import chain, islice
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import TypeVar

from pipeline.common.errors import TryAgainError

WAITING_TASKS = 2
"""Tasks for each worker that wait until it is free."""

T = TypeVar("T")
R = TypeVar("R")


def run_tasks(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Generator[R, None, None]:
    """Yield function(task) for every task, as they finish. The first error stops all workers at once.

    Tasks are taken when workers are free, with WAITING_TASKS ahead: there may be more than memory holds.

    Raises what `function` raised, or TryAgainError when a worker was killed from outside.
    """
    tasks = iter(tasks)
    first = list(islice(tasks, workers))
    tasks = chain(first, tasks)
    if len(first) <= 1:
        yield from map(function, tasks)
        return
    context = start_server(function.__module__)
    lifeline, our_end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(len(first), context, _stay_alive_while, (lifeline,))
    try:
        waiting = {pool.submit(function, task) for task in islice(tasks, len(first) * (1 + WAITING_TASKS))}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            waiting |= {pool.submit(function, task) for task in islice(tasks, len(done))}
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise TryAgainError(
            "a worker process was killed, most likely because memory ran out. "
            "Run the same command again, with a smaller --workers, to resume"
        ) from None
    finally:
        our_end.close()
        pool.shutdown(wait=True, cancel_futures=True)


def start_server(module: str) -> ForkServerContext:
    """Start the process that workers are forked from, unless it runs; it imports `module` once for all of them.

    Whoever is still to import much for itself does it earlier than `run_tasks`: both then import at the same time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    multiprocessing.forkserver.ensure_running()
    return context


def _stay_alive_while(lifeline: Connection) -> None:
    """Prepare a worker process: it ignores Ctrl-C, which the parent handles, and ends when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        with suppress(EOFError, OSError):
            lifeline.recv()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
