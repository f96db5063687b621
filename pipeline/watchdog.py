"""Ends a process whose step hangs: a rank that is gone must take the others down in a minute, not in thirty."""

import os
import sys
import threading
import time

from pipeline.errors import TryAgainError

FIRST_STEP_SECONDS = 1_800.0
"""Connecting, compiling and tuning kernels happen in the first step."""
BOUNDARY_SECONDS = 900.0
"""Grids, evaluations and checkpoints happen between two steps, some of them on rank 0 alone."""


class Watchdog:
    """A thread that exits the process when the next `beat` is overdue.

    Only for runs of several processes: one process cannot wait for another. Exiting is all that is left when a
    collective hangs, since no Python code runs until it returns.
    """

    def __init__(self, step_seconds: float, *, enabled: bool) -> None:
        self.step_seconds = step_seconds
        self._deadline = time.monotonic() + FIRST_STEP_SECONDS
        self._beaten = time.monotonic()
        self._usual, self._at_boundary = step_seconds, False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if enabled and step_seconds > 0:
            self._thread.start()

    def beat(self, *, boundary: bool = False) -> None:
        """Note that a step or a boundary's work is done; at a log `boundary` more time is given for what follows."""
        now = time.monotonic()
        if not self._at_boundary:
            self._usual = max(self.step_seconds, 20 * (now - self._beaten))  # slow machines take slow steps
        self._deadline = now + (max(self._usual, BOUNDARY_SECONDS) if boundary else self._usual)
        self._beaten, self._at_boundary = now, boundary

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.step_seconds / 4)):
            if time.monotonic() > self._deadline:
                rank = os.environ.get("RANK", "0")
                print(
                    f"error: rank {rank}: no step has finished for {time.monotonic() - self._beaten:.0f} s; another "
                    "process is gone or hangs. Run it again on all of them: it goes on from the last checkpoint "
                    "(limit: runtime.step_timeout_seconds)",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(TryAgainError.exit_code)
