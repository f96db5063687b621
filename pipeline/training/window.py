"""Statistics of the steps between two log boundaries, summed on the device and reduced over ranks once."""

import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.common.errors import DataError
from pipeline.training.step import STATISTICS
from pipeline.training.stop_requests import StopRequests

if TYPE_CHECKING:
    from accelerate import Accelerator


SCALER_PATIENCE_STEPS = 32
"""A scale that begins at 2^16 and is halved at every overflow has no business below 2^-16."""


@dataclass(frozen=True)
class Report:
    """A window, equal on all ranks but for `seconds` and `step_seconds`."""

    values: dict[str, float]
    """Means that follow from position: losses, D's outputs, gradient norms, diversity."""
    images: int
    steps: int
    nonfinite_steps: int
    hopeless_steps: int
    """Updates that fp16's loss scaler skipped, if it skipped all of a window longer than any search for a scale."""
    stop: int
    """The signal that asked any rank to stop, or 0."""
    save: bool
    """Whether any rank was asked to save."""
    seconds: float
    """Wall time of the window."""
    data_wait_seconds: float
    """Time in which the rank that waited longest waited for images."""
    step_seconds: float
    """Host time in updates."""

    def require_finite(self, last_checkpoint: str) -> None:
        """Raise DataError when updates of the window were lost: training has diverged."""
        if lost := self.nonfinite_steps or self.hopeless_steps:
            raise DataError(
                f"{lost} of the last {self.steps} updates had NaN or infinite gradients; "
                f"the last good checkpoint is {last_checkpoint or 'none'}: "
                "resume from it with a smaller learning rate (recipe.learning_rate_g, recipe.learning_rate_d)"
            )


class Window:
    """Sums the statistics of steps without a sync; `reduce` ends the window with the only one."""

    def __init__(self, accelerator: "Accelerator", requests: StopRequests) -> None:
        self.accelerator = accelerator
        self.requests = requests
        self._totals = torch.zeros(len(STATISTICS), device=accelerator.device)
        self._images = self._steps = 0
        self._step_seconds = 0.0
        self._start = time.monotonic()
        self._waited = 0.0

    def add(self, statistics: Tensor, images: int, seconds: float) -> None:
        """Count one update on `images` images, which took the host `seconds`."""
        self._totals += statistics
        self._images += images
        self._steps += 1
        self._step_seconds += seconds

    def reduce(self, data_wait_seconds: float, checkpoint_overdue: bool) -> Report:
        """Reduce over all ranks, so that all of them see the same values and do the same next.

        `data_wait_seconds` is the loader's total so far.
        """
        requests, ranks = self.requests, self.accelerator.num_processes
        asked_to_save, requests.save = requests.save, False  # now: one that comes while we wait is for the next time
        waits = [0.0] * ranks  # one slot a rank: all wait for the rank that waits longest for its data
        waits[self.accelerator.process_index] = data_wait_seconds - self._waited
        host = [
            float(requests.stop == signal.SIGTERM),
            float(requests.stop == signal.SIGINT),
            float(asked_to_save or checkpoint_overdue),
            *waits,
        ]
        both = torch.cat([self._totals, torch.tensor(host, device=self._totals.device)])
        reduced: list[float] = self.accelerator.reduce(both, "sum").tolist()
        means = {name: total / (self._steps * ranks) for name, total in zip(STATISTICS, reduced, strict=False)}
        terminated, interrupted, save, *waits = reduced[len(STATISTICS) :]
        nonfinite, skipped = means.pop("nonfinite") * self._steps, round(means.pop("skipped") * self._steps)
        means["diversity"] = means.pop("deviation_fake") / max(means.pop("deviation_real"), 1e-8)
        now = time.monotonic()
        report = Report(
            values=means,
            images=self._images,
            steps=self._steps,
            nonfinite_steps=round(nonfinite) or int(nonfinite > 0),
            hopeless_steps=skipped if skipped == self._steps >= SCALER_PATIENCE_STEPS else 0,
            stop=signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0,
            save=save > 0,
            seconds=now - self._start,
            data_wait_seconds=max(waits),
            step_seconds=self._step_seconds,
        )
        self._totals.zero_()
        self._images = self._steps = 0
        self._step_seconds = 0.0
        self._start, self._waited = now, data_wait_seconds
        return report
