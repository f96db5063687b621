"""What an update needs beside images, drawn by a thread while the updates before run."""

import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Generic, TypeVar

from pipeline.data.loading.thread_pool import ThreadPool

CLOSE_SECONDS = 2.0
"""Longest wait for the block in hand."""

T = TypeVar("T")


class Ahead(Generic[T]):
    """The items of `blocks`, one after the other. A thread makes the next block: in blocks, because a handover costs.

    An error in the thread is raised where its block was due.
    """

    def __init__(self, blocks: Iterator[Iterable[T]]) -> None:
        self._make = partial(next, blocks)
        self._thread = ThreadPool(1, "ahead")
        self._items: Iterator[T] = iter(())
        self._block = self._thread.submit(self._make)

    def __iter__(self) -> "Ahead[T]":
        return self

    def __next__(self) -> T:
        for item in self._items:
            return item
        block = self._block.result()
        self._block = self._thread.submit(self._make)
        self._items = iter(block)
        return next(self._items)

    def close(self) -> None:
        """End the thread: one that runs when the interpreter ends takes the process down with SIGABRT."""
        self._thread.close()
        self._thread.join(time.monotonic() + CLOSE_SECONDS)
