"""What a run does between two updates: grids, evaluations and checkpoints, and what each stops the training for."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from pipeline.training.accelerator import wait_for_all
from pipeline.training.collapse.guard import Guard
from pipeline.training.evaluator import Evaluator
from pipeline.training.manager import CheckpointManager
from pipeline.training.run_log import RunLog
from pipeline.training.schedule import Due, Schedule
from pipeline.training.step import AdversarialStep
from pipeline.training.window import Window

if TYPE_CHECKING:
    from accelerate import Accelerator


class Boundary:
    """Does what is due. All ranks do it together, at the same position."""

    def __init__(
        self,
        accelerator: "Accelerator",
        step: AdversarialStep,
        window: Window,
        evaluator: Evaluator,
        manager: CheckpointManager,
        schedule: Schedule,
        run_log: RunLog,
    ) -> None:
        self.accelerator = accelerator
        self.step = step
        self.window = window
        self.evaluator = evaluator
        self.manager = manager
        self.schedule = schedule
        self.run_log = run_log
        self.guard = Guard(accelerator, step, manager, run_log)

    def do(self, due: Due, images_seen: int) -> None:
        """Draw the grid, measure the quality and save, as far as they are due; note what each took."""
        stopped: dict[str, float] = {}
        quality: dict[str, float] = {}
        # Measured once for all three, in the time of the first.
        averaged = cache(lambda: self.step.ema.estimate_batchnorm(self.evaluator.seed))
        if due.grid:
            with _timed(stopped, "grid"):
                grid = self.evaluator.draw_grid(averaged(), images_seen)
            self.run_log.grid(grid, images_seen)
        if due.evaluation:
            with _timed(stopped, "evaluate"):
                quality = self.evaluator.measure(averaged())
                self.run_log.quality(quality, images_seen)
                if not self.guard.look(images_seen, finished=self.schedule.finished(images_seen)):
                    quality = {}  # of weights that are gone, or bad: they must not become the best
        if due.checkpoint:
            with _timed(stopped, "checkpoint"):
                averaged()
                self.manager.save(self.step, images_seen, self.run_log.run, quality, self.window.state())
            self.schedule.saved()
        self.schedule.spent(stopped)
        self.run_log.stopped(stopped, images_seen)
        # Rank 0 alone writes, and comes last; on GPUs the others would enter a step that seems to hang.
        wait_for_all(self.accelerator)

    def close(self, *, hurry: bool) -> None:
        """Wait for trackers, for what is being written and for the mirror; less long in a `hurry`."""
        self.run_log.close(hurry=hurry)
        self.manager.close(hurry=hurry)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Put the wall time of a task into `seconds`."""
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start
