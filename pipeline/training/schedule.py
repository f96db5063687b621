"""What is due when: log boundaries, grids, evaluations and checkpoints, from images seen; agreements, from seconds."""

import time
from dataclasses import dataclass

from pipeline.config import ScheduleConfig

AGREEMENT_SECONDS = 5.0
"""Between two points where all ranks agree on whether to stop or save: how long a signal waits at most."""


@dataclass(frozen=True)
class Due:
    """What is to be done where all ranks agree."""

    grid: bool
    evaluation: bool
    checkpoint: bool

    @property
    def task(self) -> str:
        """The longest of them, '' for none: how long it takes says what is unusual."""
        return "evaluation" if self.evaluation else "checkpoint" if self.checkpoint else "grid" if self.grid else ""


class Schedule:
    """The cadences of `ScheduleConfig`, rounded up: a log boundary to whole batches, the rest to log boundaries."""

    def __init__(self, config: ScheduleConfig, boundary: int, batch: int) -> None:
        """`boundary` is the last log boundary, in images seen."""
        self.config = config
        self.batch = batch
        self._boundary = boundary
        self._agreement = 0
        self._saved_at = time.monotonic()

    def finished(self, images_seen: int) -> bool:
        """Whether the run has seen all its images."""
        return images_seen >= self.config.total_images

    def at_boundary(self, images_seen: int) -> bool:
        """Whether a log boundary has come, where a window of statistics ends."""
        return self.finished(images_seen) or self._crossed(self.config.log_every_images, images_seen)

    def at_agreement(self, images_seen: int) -> bool:
        """Whether the ranks agree here on what to do next: at a log boundary, or AGREEMENT_SECONDS after the last."""
        return images_seen >= self._agreement or self.at_boundary(images_seen)

    @property
    def checkpoint_overdue(self) -> bool:
        """Whether `checkpoint_minutes` have passed on this rank since its last checkpoint; 0 minutes never pass."""
        return time.monotonic() - self._saved_at >= 60 * self.config.checkpoint_minutes > 0

    def due(self, images_seen: int, step_seconds: float, *, checkpoint_wanted: bool) -> Due:
        """Return what is due at this agreement, and move on to the next, by how long a step takes.

        Both are the same on all ranks: the slowest one's `step_seconds`, and `checkpoint_wanted`, which is a request
        to save or to stop, or an overdue checkpoint of any. Nothing else is ever due between two log boundaries.
        """
        self._agreement = images_seen + self.batch * max(1, int(AGREEMENT_SECONDS / max(step_seconds, 1e-6)))
        if not self.at_boundary(images_seen):
            return Due(grid=False, evaluation=False, checkpoint=checkpoint_wanted)
        config, finished = self.config, self.finished(images_seen)
        evaluation = finished or self._crossed(config.evaluate_every_images, images_seen)
        due = Due(
            grid=finished or self._crossed(config.grid_every_images, images_seen),
            evaluation=evaluation,
            checkpoint=evaluation or checkpoint_wanted or self._crossed(config.checkpoint_every_images, images_seen),
        )
        self._boundary = images_seen
        return due

    def saved(self) -> None:
        """Note that a checkpoint was just written."""
        self._saved_at = time.monotonic()

    def _crossed(self, every: int, images_seen: int) -> bool:
        """Whether a multiple of `every` images lies after the last boundary, up to `images_seen`."""
        return images_seen // every > self._boundary // every
