"""What is due when: by images seen and by what it costs; agreements, from seconds."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config import ScheduleConfig

AGREEMENT_SECONDS = 5.0
"""Between two points where all ranks agree on whether to stop or save: how long a signal waits at most."""

TASKS = {"grid": 1, "evaluate": 2, "checkpoint": 4}
"""What a run does between two updates, and the bit that stands for it in `Schedule.affordable`."""
SAVING = 8
"""The bit for a checkpoint that is still being written: another one would wait for it."""


@dataclass(frozen=True)
class Due:
    """What is to be done where all ranks agree."""

    grid: bool = False
    evaluation: bool = False
    checkpoint: bool = False
    saving: bool = False
    """Whether the checkpoint waits for the one before it."""

    @property
    def task(self) -> str:
        """The longest of them, '' for none: how long it takes says what is unusual."""
        longest = "evaluation" if self.evaluation else "checkpoint" if self.checkpoint else "grid" if self.grid else ""
        return f"{longest} after another checkpoint" if self.checkpoint and self.saving else longest


class Schedule:
    """The cadences of `ScheduleConfig`, rounded up: a log boundary to whole batches, the rest to log boundaries.

    A task that has come due waits for the first log boundary where its share of the time has room for it.
    """

    def __init__(self, config: ScheduleConfig, boundary: int, batch: int) -> None:
        """`boundary` is the last log boundary, in images seen."""
        self.config = config
        self.batch = batch
        self._boundary = boundary
        self._done = dict.fromkeys(TASKS, boundary)  # the log boundary where each was done last, as far as is known
        self._costs: dict[str, tuple[float, float]] = {}  # when it was begun last, and the seconds that it took
        self._agreement = 0
        self._saved_at = time.monotonic()

    def finished(self, images_seen: int) -> bool:
        """Whether the run has seen all its images."""
        return images_seen >= self.config.total_images

    def at_boundary(self, images_seen: int) -> bool:
        """Whether a log boundary has come, where a window of statistics ends."""
        return self.finished(images_seen) or _crossed(self.config.log_every_images, self._boundary, images_seen)

    def at_agreement(self, images_seen: int) -> bool:
        """Whether the ranks agree here on what to do next: at a log boundary, or AGREEMENT_SECONDS after the last."""
        return images_seen >= self._agreement or self.at_boundary(images_seen)

    @property
    def checkpoint_overdue(self) -> bool:
        """Whether `checkpoint_minutes` have passed on this rank since its last checkpoint; 0 minutes never pass."""
        return time.monotonic() - self._saved_at >= 60 * self.config.checkpoint_minutes > 0

    def affordable(self, *, saving: bool = False) -> int:
        """Return the tasks that stay within their share of the time if they are done now, as bits.

        Each has an equal part of `overhead_share`, so together they keep within it. The cost is that of the last
        time. What this process has not done yet has no known cost, and is affordable. `saving` says that a checkpoint
        is still being written.
        """
        now, share, saved = time.monotonic(), self.config.overhead_share / len(TASKS), SAVING * saving
        if self.config.overhead_share == 1:
            return sum(TASKS.values()) | saved
        allowed = {name: share * (now - begun) >= seconds for name, (begun, seconds) in self._costs.items()}
        if saving:
            allowed |= {"evaluate": False, "checkpoint": False}
        return sum(bit for name, bit in TASKS.items() if allowed.get(name, True)) | saved

    def due(self, images_seen: int, step_seconds: float, affordable: int, *, checkpoint_wanted: bool) -> Due:
        """Return what is due at this agreement, and move on to the next, by how long a step takes.

        All are the same on all ranks: the slowest one's `step_seconds`, what rank 0 finds `affordable`, and
        `checkpoint_wanted`, which is a request to save or to stop, or an overdue checkpoint of any. Nothing else is
        ever due between two log boundaries. The end of the run and what is wanted do not ask what they cost.
        """
        self._agreement = images_seen + self.batch * max(1, int(AGREEMENT_SECONDS / max(step_seconds, 1e-6)))
        saving = bool(affordable & SAVING)
        if not self.at_boundary(images_seen):
            return Due(checkpoint=checkpoint_wanted, saving=saving)
        config, finished = self.config, self.finished(images_seen)
        intervals = (config.grid_every_images, config.evaluate_every_images, config.checkpoint_every_images)
        grid, evaluation, checkpoint = (
            finished or (bool(affordable & bit) and _crossed(every, self._done[name], images_seen))
            for (name, bit), every in zip(TASKS.items(), intervals, strict=True)
        )
        checkpoint = checkpoint or evaluation or checkpoint_wanted
        for name, done in zip(TASKS, (grid, evaluation, checkpoint), strict=True):
            self._done[name] = images_seen if done else self._done[name]
        self._boundary = images_seen
        return Due(grid, evaluation, checkpoint, saving)

    def spent(self, seconds: Mapping[str, float]) -> None:
        """Note what tasks that were just done have cost, by name. An evaluation pays for the checkpoint it asks for."""
        begun = time.monotonic() - sum(seconds.values())
        self._costs |= {name: (begun, cost) for name, cost in seconds.items()}
        if "evaluate" in seconds:
            self._costs["evaluate"] = begun, seconds["evaluate"] + seconds.get("checkpoint", 0.0)

    def saved(self) -> None:
        """Note that a checkpoint was just written."""
        self._saved_at = time.monotonic()


def _crossed(every: int, since: int, images_seen: int) -> bool:
    """Whether a multiple of `every` images lies after `since`, up to `images_seen`."""
    return images_seen // every > since // every
