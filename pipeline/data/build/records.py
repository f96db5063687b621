"""What the records of finished groups add up to. They are read in parallel, and kept as columns: there may be many."""

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline.common.errors import DataError
from pipeline.common.storage import Store
from pipeline.data.build.options import DEFAULT_MAX_BAD
from pipeline.data.build.state import BuildState, Group, group_name, read_group
from pipeline.data.commit import require_recorded
from pipeline.data.shard_table import Shard, ShardTable
from pipeline.data.sources.interface import RefusalLog

READERS = 32
"""Records read at the same time: small files, each of which takes an answer of the store."""
READ_AHEAD = 1024
"""Records that wait, read, for their turn."""


@dataclass
class Records:
    """The sum of the records of some groups."""

    groups: list[int]
    """Those that are finished, in their order."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    shards: ShardTable = field(default_factory=lambda: ShardTable.of([]))
    group_of: "array[int]" = field(default_factory=lambda: array("q"))
    """The group of each shard."""
    stretched: "array[float]" = field(default_factory=lambda: array("d"))
    """Of stretched pictures, the logarithms of width over height."""
    sizes: Counter[str] = field(default_factory=Counter)
    """Pictures by the step of SIZE_STEPS that their shorter side was in."""
    other_colors: int = 0
    """Pictures whose color profile could not be used."""

    def measured(self) -> dict[str, Any]:
        """Return what dataset.json says of the pictures as they were: `sizes`, their number by SIZE_STEPS.

        Where they were stretched also `aspect`, the geometric mean of width over height; where color profiles could not
        be used `other_colors`, the number of such pictures.
        """
        found: dict[str, Any] = {}
        if self.stretched:
            found["aspect"] = round(math.exp(math.fsum(self.stretched) / len(self.stretched)), 6)
        if self.sizes:
            found["sizes"] = {step: self.sizes[step] for step in sorted(self.sizes, key=int)}
        if self.other_colors:
            found["other_colors"] = self.other_colors
        return found


def read_records(origins: Mapping[int, Store]) -> Records:
    """Return the sum of the records of finished groups, each in its store. Raises DataError for one that is damaged."""
    found = Records(sorted(origins))

    def shards() -> Iterator[Shard]:
        for index, group in _read(origins, found.groups):
            found.refused += group.refused
            found.skipped += group.skipped
            found.stretched.extend(group.stretched)
            found.sizes.update(group.sizes)
            found.other_colors += group.other_colors
            found.group_of.extend([index] * len(group.shards))
            yield from group.shards

    found.shards = ShardTable.of(shards())
    return found


def _read(origins: Mapping[int, Store], groups: list[int]) -> Iterator[tuple[int, Group]]:
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(groups), READ_AHEAD):
            some = groups[start : start + READ_AHEAD]
            yield from zip(some, pool.map(lambda index: read_group(origins[index], index), some), strict=True)


def check_records(state: BuildState, found: Records, wanted: range, max_bad: float | None, out: str) -> RefusalLog:
    """Return all refusals. Raises DataError when they are too many, or when a wanted group has no record."""
    refused = RefusalLog(state.refused + found.refused)
    refused.unnamed.update(state.lost)
    _check_refusals(refused, state, max_bad)
    if missing := len(wanted) - len(found.groups):  # of a damaged plan there may be too many to list
        there = set(found.groups)
        first = next(index for index in wanted if index not in there)
        raise DataError(
            f"{out}: {missing} of {len(wanted)} groups are missing (the first is {first}); "
            "build the missing parts, then merge again"
        )
    return refused


def check_shards(store: Store, found: Records, *, alone: bool) -> None:
    """Raise DataError unless the shards of the records, and where they are `alone` no others, are in `store`.

    The next build makes those that are not there again.
    """

    def forget(lost: set[str]) -> None:
        pairs = zip(found.shards.names(), found.group_of, strict=True)
        for index in {group for name, group in pairs if name in lost}:
            store.delete(group_name(index))

    require_recorded(
        store,
        found.shards,
        forget=forget,
        spare=lambda name: not alone,
        advice="build again with the same options (and --part): what is missing is made again, the rest is kept",
    )


def accepted_share(max_bad: float | None) -> float:
    """Return the share of pictures that may be unusable, by default DEFAULT_MAX_BAD."""
    return DEFAULT_MAX_BAD if max_bad is None else max_bad


def _check_refusals(refused: RefusalLog, state: BuildState, max_bad: float | None) -> None:
    """Raise DataError when too many pictures cannot be used."""
    pictures = state.plan.pictures + len(state.refused) + sum(state.lost.values())
    share = refused.count / pictures
    names = "; ".join(f"{key}: {reason}" for key, reason in refused.entries[:3])
    lost = "; ".join(f"{number:,} {reason}" for reason, number in refused.unnamed.items())
    what = "; ".join(filter(None, (names, lost)))
    advice = "repair the source, or accept them with --max-bad"
    if state.damaged and max_bad is None:
        raise DataError(f"{state.location}: {what}. {advice} {share + 0.0005:.3f} (what could be read is kept)")
    if share > accepted_share(max_bad):
        raise DataError(
            f"{state.location}: {refused.count:,} of {pictures:,} pictures cannot be used, more than "
            f"{accepted_share(max_bad):.1%} ({what}); {advice}"
        )
