"""The statistics that updates add up on the device between two log boundaries, reduced over ranks."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.checkpoints.store import Checkpoint
from pipeline.common.errors import DataError
from pipeline.training.step import OF_D, OF_G, STATISTICS
from pipeline.training.stop_requests import StopRequests

if TYPE_CHECKING:
    from accelerate import Accelerator


SCALER_PATIENCE_STEPS = 32
"""A scale that begins at 2^16 and is halved at every overflow has no business below 2^-16."""


NONFINITE_SHARE = 0.05
"""Share of a window's updates that may be lost to NaN or infinite gradients; one may always be."""


@dataclass(frozen=True)
class Report:
    """A window so far, equal on all ranks but for `seconds` and `step_seconds`."""

    whole: bool
    """Whether the window ends here: only then do its statistics count."""
    values: dict[str, float]
    """Means that follow from position: losses, D's outputs, gradient norms, diversity.

    Each over the updates of its network; without those of a network that had none."""
    images: int
    """Images of this process's part of the window: a resumed run may begin inside one."""
    steps: int
    """Updates of the whole window."""
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
    affordable: int
    """What rank 0 allows to be done here: `Schedule.affordable`."""
    slowest_step_seconds: float
    """Wall time of a step since the report before, on the slowest rank."""
    seconds: float
    """Wall time of the window."""
    data_wait_seconds: float
    """Time in which the rank that waited longest waited for images."""
    step_seconds: float
    """Host time in updates."""

    def require_finite(self, last_checkpoint: Callable[[], str]) -> None:
        """Raise DataError when training has diverged: weights are not finite, or more updates were lost than may be.

        A single overflow is skipped by the optimizer, and the run continues: a resumed run would only meet it again.
        What a window lost counts at its end, and weights that are not finite before they are saved: so all runs
        stop at the same image. `last_checkpoint` is called only then: it may wait for one that is being written.
        """
        if not (self.whole or self.stop or self.save):
            return
        tolerated = self.nonfinite_steps <= max(1, int(NONFINITE_SHARE * self.steps))
        lost = (self.hopeless_steps if tolerated else self.nonfinite_steps) if self.whole else 0
        if lost or not self.weights_finite:
            what = f"{lost} of the last {self.steps} updates had NaN or infinite gradients"
            raise DataError(
                f"{what if self.weights_finite else 'the weights are NaN or infinite'}; "
                f"the last good checkpoint is {last_checkpoint() or 'none'}: "
                "resume from it with a smaller learning rate (recipe.learning_rate_g, recipe.learning_rate_d)"
            )


class Window:
    """Counts the updates that add to `statistics`, without a sync; `reduce` is the only one.

    A run that was stopped inside a window goes on with what `state` put into its checkpoint: its metrics.jsonl then
    equals that of a run that nobody stopped.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        requests: StopRequests,
        statistics: Tensor,
        images_seen: int,
        checkpoint: Checkpoint | None,
    ) -> None:
        """`statistics` are those of `AdversarialStep`, all 0. Raises DataError for a damaged window in a checkpoint."""
        self.accelerator = accelerator
        self.requests = requests
        self.begin = self._seen = images_seen
        """The log boundary where it began, in images seen."""
        self._totals = statistics
        self._images = self._steps = self._steps_d = self._steps_g = 0
        if checkpoint is not None and "window" in checkpoint.state:
            self._restore(checkpoint.state["window"], checkpoint.path)
        self._step_seconds = 0.0
        self._start = self._reduced_at = time.monotonic()
        self._reduced_steps = self._steps
        self._waited = 0.0

    def _restore(self, saved: Any, where: str) -> None:
        try:
            self.begin, self._steps = int(saved["begin"]), int(saved["steps"])
            totals = torch.tensor(saved["totals"], dtype=torch.float32).reshape(-1, len(STATISTICS))
            self._steps_d, self._steps_g = map(int, saved.get("steps_of", [self._steps] * 2))
            least, most = sorted((self._steps_d, self._steps_g))
            if not (self.begin < self._seen and 0 <= least <= most <= self._steps > 0 and len(totals)):
                raise ValueError
            # Other ranks than those that saved: each gets the mean, of which reduction makes the same means again.
            same = len(totals) == self.accelerator.num_processes
            self._totals += (totals[self.accelerator.process_index] if same else totals.mean(0)).to(self._totals.device)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):
            raise DataError(
                f"{where}/state.json: its entry `window` is damaged; without it, the next line of metrics.jsonl covers "
                "only the images from here on"
            ) from None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint's state.json holds of it, nothing at a log boundary. All ranks must call it."""
        if not self._steps:
            return {}
        totals = self.accelerator.gather(self._totals).reshape(-1, len(STATISTICS))
        window = {"begin": self.begin, "steps": self._steps, "totals": totals.tolist()}
        if (of := [self._steps_d, self._steps_g]) != [self._steps] * 2:
            window["steps_of"] = of
        return {"window": window}

    def add(self, images: int, seconds: float, turns: tuple[bool, bool] = (True, True)) -> None:
        """Count one update on `images` images, which took the host `seconds`; `turns` are `step.turns` of it."""
        self._images += images
        self._seen += images
        self._steps += 1
        self._steps_d += turns[0]
        self._steps_g += turns[1]
        self._step_seconds += seconds

    def reduce(
        self,
        data_wait_seconds: float,
        checkpoint_overdue: bool,
        weights_finite: Tensor,
        *,
        end: bool,
        affordable: int = 0,
    ) -> Report:
        """Reduce over all ranks, so that all of them see the same values and do the same next.

        `data_wait_seconds` is the loader's total so far; `weights_finite` is a scalar on the device, 1 or 0. `end`
        ends the window, and the next one begins. `affordable` is what `Schedule.affordable` returned on rank 0, and
        0 on the others.
        """
        requests, ranks = self.requests, self.accelerator.num_processes
        asked_to_save, requests.save = requests.save, False  # now: one that comes while we wait is for the next time
        waits, steps = [0.0] * ranks, [0.0] * ranks  # one slot a rank: all wait for the slowest
        waits[self.accelerator.process_index] = data_wait_seconds - self._waited
        since = time.monotonic() - self._reduced_at
        steps[self.accelerator.process_index] = since / max(1, self._steps - self._reduced_steps)
        host = [
            float(requests.stop == signal.SIGTERM),
            float(requests.stop == signal.SIGINT),
            float(asked_to_save or checkpoint_overdue),
            float(affordable),
            *waits,
            *steps,
        ]
        device = self._totals.device
        both = torch.cat([self._totals, weights_finite.float().reshape(1), torch.tensor(host, device=device)])
        reduced: list[float] = self.accelerator.reduce(both, "sum").tolist()
        steps_of = dict.fromkeys(OF_D, self._steps_d) | dict.fromkeys(OF_G, self._steps_g)
        counts = {name: steps_of.get(name, self._steps) * ranks for name in STATISTICS}
        means = {name: total / counts[name] for name, total in zip(STATISTICS, reduced, strict=False) if counts[name]}
        finite, terminated, interrupted, save, allowed, *slots = reduced[len(STATISTICS) :]
        nonfinite, skipped = means.pop("nonfinite") * self._steps, round(means.pop("skipped") * self._steps)
        means["diversity"] = means.pop("deviation_fake") / max(means.pop("deviation_real"), 1e-8)
        now = time.monotonic()
        report = Report(
            whole=end,
            values=means,
            images=self._images,
            steps=self._steps,
            nonfinite_steps=round(nonfinite) or int(nonfinite > 0),
            weights_finite=round(finite) == ranks,
            hopeless_steps=skipped if skipped == self._steps >= SCALER_PATIENCE_STEPS else 0,
            stop=signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0,
            save=save > 0,
            affordable=round(allowed),
            slowest_step_seconds=max(slots[ranks:]),
            seconds=now - self._start,
            data_wait_seconds=max(slots[:ranks]),
            step_seconds=self._step_seconds,
        )
        if end:
            self._totals.zero_()
            self._images = self._steps = self._steps_d = self._steps_g = 0
            self._step_seconds = 0.0
            self._start, self._waited, self.begin = now, data_wait_seconds, self._seen
        self._reduced_at, self._reduced_steps = now, self._steps
        return report
