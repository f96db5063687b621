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


NONFINITE_SHARE = 0.05
"""Share of a window's updates that may be lost to NaN or infinite gradients; one may always be."""


@dataclass(frozen=True)
class Report:
    """A window, equal on all ranks but for `seconds` and `step_seconds`."""

    values: dict[str, float]
    """Means that follow from position: losses, D's outputs, gradient norms, diversity."""
    images: int
    steps: int
    nonfinite_steps: int
    """Updates that had NaN or infinite gradients."""
    weights_finite: bool
    """Whether every rank's weights are finite at the end of the window."""
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
        """Raise DataError when training has diverged: weights are not finite, or more updates were lost than may be.

        A single overflow is skipped by the optimizer, and the run continues: a resumed run would only meet it again.
        """
        tolerated = self.nonfinite_steps <= max(1, int(NONFINITE_SHARE * self.steps))
        if (lost := self.hopeless_steps if tolerated else self.nonfinite_steps) or not self.weights_finite:
            what = f"{lost} of the last {self.steps} updates had NaN or infinite gradients"
            raise DataError(
                f"{what if self.weights_finite else 'the weights are NaN or infinite'}; "
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
        """Count one update on `images` images, which took the host `seconds`. What is not finite counts as 0."""
        self._totals += torch.nan_to_num(statistics, nan=0.0, posinf=0.0, neginf=0.0)
        self._images += images
        self._steps += 1
        self._step_seconds += seconds

    def reduce(self, data_wait_seconds: float, checkpoint_overdue: bool, weights_finite: Tensor) -> Report:
        """Reduce over all ranks, so that all of them see the same values and do the same next.

        `data_wait_seconds` is the loader's total so far; `weights_finite` is a scalar on the device, 1 or 0.
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
        device = self._totals.device
        both = torch.cat([self._totals, weights_finite.float().reshape(1), torch.tensor(host, device=device)])
        reduced: list[float] = self.accelerator.reduce(both, "sum").tolist()
        means = {name: total / (self._steps * ranks) for name, total in zip(STATISTICS, reduced, strict=False)}
        finite, terminated, interrupted, save, *waits = reduced[len(STATISTICS) :]
        nonfinite, skipped = means.pop("nonfinite") * self._steps, round(means.pop("skipped") * self._steps)
        means["diversity"] = means.pop("deviation_fake") / max(means.pop("deviation_real"), 1e-8)
        now = time.monotonic()
        report = Report(
            values=means,
            images=self._images,
            steps=self._steps,
            nonfinite_steps=round(nonfinite) or int(nonfinite > 0),
            weights_finite=round(finite) == ranks,
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
