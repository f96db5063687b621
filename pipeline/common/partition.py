"""One part of the work that several machines share: `--part i/N`, or the index of an Indexed Job or a Slurm array."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.common.errors import UsageError

INDEX_VARIABLES = ("JOB_COMPLETION_INDEX", "SLURM_ARRAY_TASK_ID")
"""Where `--part N` finds i: an Indexed Job on Kubernetes, an array job of Slurm."""


@dataclass(frozen=True)
class Partition:
    """Part `index` of `count`, counted from 0. By default, the whole."""

    index: int = 0
    count: int = 1

    def slice(self, total: int) -> range:
        """Return which of `total` items are this part's: contiguous, and sizes differ by at most one."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def parse_partition(text: str | None, environment: Mapping[str, str] = os.environ) -> Partition:
    """Return the part that `--part` means: `i/N`, or `N` alone with i from INDEX_VARIABLES; None is the whole.

    Raises UsageError for anything else.
    """
    if text is None:
        return Partition()
    names = " or ".join(INDEX_VARIABLES)
    match = re.fullmatch(r"(?:(\d+)/)?(\d+)", text)
    if match is None:
        raise UsageError(f"--part {text}: expected i/N such as 0/20, or N with i in {names}")
    index = match[1] or next((found for name in INDEX_VARIABLES if (found := environment.get(name))), "")
    if not index.isdigit():
        raise UsageError(f"--part {text}: names the number of parts but not the part; expected i/N, or {names} set")
    part = Partition(int(index), int(match[2]))
    if part.index >= part.count:
        raise UsageError(f"--part {part}: parts count from 0, so the last one is {part.count - 1}/{part.count}")
    return part
