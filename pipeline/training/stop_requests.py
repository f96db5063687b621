"""Signals from outside: SIGTERM, SIGINT and SIGHUP stop a run after saving, SIGUSR1 saves and continues."""

import os
import signal
from types import FrameType
from typing import Any, Self

from pipeline.common.errors import Interrupted, Stopped


class StopRequests:
    """Only notes what was asked for; the loop acts on it where all ranks agree. A second SIGINT interrupts.

    A context manager: who called training has its own signal handlers back afterwards.
    """

    def __init__(self) -> None:
        self.stop = 0
        """Number of the signal that asks to stop, or 0."""
        self.save = False
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        handlers = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop, signal.SIGUSR1: self._save}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which nohup asks for
            handlers[signal.SIGHUP] = self._hang_up
        self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def end_loading(self, images: int) -> None:
        """Raise Stopped when a stop was asked for while the data set is loaded, of which `images` are there."""
        if self.stop:
            raise stopped(self.stop, f"while the data set was loaded, after {images:,} images; run it again to resume")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = number

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        """Stop as if by SIGTERM, and write nothing more to a terminal that is gone: each write would be an error."""
        with open(os.devnull, "wb") as nowhere:
            for fd in self._terminals:
                os.dup2(nowhere.fileno(), fd)
        self._stop(signal.SIGTERM, frame)

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.save = True


def stopped(number: int, message: str) -> Stopped:
    """Return the error that ends a run that signal `number` stopped."""
    return Interrupted(message) if number == signal.SIGINT else Stopped(message)
