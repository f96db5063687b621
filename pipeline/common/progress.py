"""How far a long piece of work is: a bar on a terminal, a line now and then anywhere else."""

import sys
import time
from types import TracebackType
from typing import Any

LINE_EVERY_SECONDS = 10.0


class Progress:
    """Shows `done of total` with the rate and the time left, on standard error. Use it as a context manager."""

    def __init__(self, what: str, total: int, unit: str = "images", *, done: int = 0) -> None:
        self._what, self._total, self._unit = what, total, unit
        self.note = ""
        """What is shown behind the numbers, for example what the time is spent on."""
        self._done = self._first = done
        self._began = self._last_line = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TextColumn(
                    "{task.completed:.0f}/{task.total:.0f} {task.fields[unit]} {task.fields[rate]} {task.fields[note]}"
                ),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self._what, total=self._total, completed=self._done, unit=self._unit, rate="", note=""
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._done > self._first:
            self._line()

    @property
    def done(self) -> int:
        """How many are done."""
        return self._done

    def advance(self, amount: int) -> None:
        """Note that `amount` more are done."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=f"{self.rate:,.0f}/s", note=self.note)
        elif time.monotonic() - self._last_line >= LINE_EVERY_SECONDS:
            self._line()

    @property
    def rate(self) -> float:
        """Done a second since the start."""
        return (self._done - self._first) / max(time.monotonic() - self._began, 1e-9)

    def _line(self) -> None:
        self._last_line = time.monotonic()
        left = (self._total - self._done) / self.rate if self.rate > 0 else 0.0
        print(
            f"{self._what}: {self._done:,}/{self._total:,} {self._unit}, {self.rate:,.0f}/s, {left:,.0f} s left"
            + (f" ({self.note})" if self.note else ""),
            file=sys.stderr,
            flush=True,
        )
