"""Ends a process whose step hangs: when one rank is gone, the others must exit in a minute, not in thirty."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.common.errors import TryAgainError

FIRST_STEP_SECONDS = 1_800.0
"""Connecting, compiling and tuning kernels happen in the first step."""
BOUNDARY_SECONDS = 900.0
"""The first grid, evaluation or checkpoint, between two steps, and partly on rank 0 alone."""


class Watchdog:
    """A thread that exits the process when the next `beat`, or the end of a `task`, is overdue.

    Only for runs of several processes: one process cannot wait for another. Exiting is all that is left when a
    collective hangs, since no Python code runs until it returns.
    """

    def __init__(self, step_seconds: float, *, enabled: bool) -> None:
        self.step_seconds = step_seconds
        self._deadline = time.monotonic() + FIRST_STEP_SECONDS
        self._beaten = time.monotonic()
        self._usual, self._steady = step_seconds, False
        self._longest: dict[str, float] = {}
        self._waits_for_data = False
        self._enabled = enabled and step_seconds > 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Note that a step is done."""
        now = time.monotonic()
        # Slow machines take slow steps; the first also compiled, and only says how long the second may take.
        self._usual = max(self.step_seconds, (20 if self._steady else 2) * (now - self._beaten))
        self._steady = True
        self._beaten, self._deadline = now, now + self._usual

    @contextmanager
    def task(self, kind: str) -> Iterator[None]:
        """Allow for a boundary's work: a grid, an evaluation, a checkpoint.

        The first of its kind may take BOUNDARY_SECONDS, a later one ten times as long as the longest before it.
        """
        self._beaten = time.monotonic()
        longest = self._longest.get(kind)
        self._deadline = self._beaten + (BOUNDARY_SECONDS if longest is None else max(self._usual, 10 * longest))
        yield
        now = time.monotonic()
        self._longest[kind] = max(self._longest.get(kind, 0.0), now - self._beaten)
        self._beaten, self._deadline = now, now + self._usual

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Say that this process waits for its images: then it is the store that hangs, and no other process."""
        self._waits_for_data = True
        yield
        self._waits_for_data = False

    def __enter__(self) -> "Watchdog":
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.step_seconds / 4)):
            if time.monotonic() > self._deadline:
                rank = os.environ.get("RANK", "0")
                why = "its images have not come" if self._waits_for_data else "another process is gone or hangs"
                print(
                    f"error: rank {rank}: no step has finished for {time.monotonic() - self._beaten:.0f} s; {why}. "
                    "Run it again on all of them: it resumes from the last checkpoint "
                    "(limit: runtime.step_timeout_seconds)",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(TryAgainError.exit_code)
