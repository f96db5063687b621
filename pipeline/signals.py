"""Requests from outside: SIGTERM and SIGINT stop a run after saving, SIGUSR1 saves and goes on."""

import signal
from types import FrameType


class Requests:
    """Only notes what was asked for; the loop acts on it where all ranks agree. A second SIGINT interrupts."""

    def __init__(self) -> None:
        self.stop = 0
        """Number of the signal that asks to stop, or 0."""
        self.save = False
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGUSR1, self._save)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = number

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.save = True
