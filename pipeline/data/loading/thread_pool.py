"""A pool of threads that never keep a process from ending. An error reaches the caller that waits for the result."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class ThreadPool:
    """`count` daemon threads: unlike ThreadPoolExecutor's, a stuck one does not hold up the exit."""

    def __init__(self, count: int, name: str) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Callable[[], T]) -> "Future[T]":
        """Run `task` on one of the threads, in the order of submission. After `close` it is canceled at once."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                _cancel(future)
            else:
                self._tasks.put((future, task))
        return future

    def close(self) -> None:
        """Cancel what has not begun and let the threads end; `join` waits for that."""
        with self._lock:
            self._closed = True
        with suppress(Empty):
            while entry := self._tasks.get_nowait():
                _cancel(entry[0])
        for _ in self._threads:
            self._tasks.put(None)

    def join(self, until: float) -> None:
        """Wait for the threads to end, but not beyond `time.monotonic()` = `until`."""
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        while (entry := self._tasks.get()) is not None:
            future, task = entry
            future.set_running_or_notify_cancel()
            try:
                result = task()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, task, entry


def _cancel(future: "Future[Any]") -> None:
    future.cancel()
    future.set_running_or_notify_cancel()  # wakes those in `concurrent.futures.wait` too
