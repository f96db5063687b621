"""Which shards a rank needs next, and for how many of them there is room."""

import sys
from collections import deque
from collections.abc import Iterator
from heapq import merge
from itertools import chain, islice, takewhile

from pipeline.data.dataset import Dataset
from pipeline.data.loading.shuffle import Shuffle, Visit

MOST_AHEAD = 256
"""Shards held ahead, however small they are: each new one costs time that grows with their number."""
ENDLESS = sys.maxsize
"""The end of a run that has none."""


def slots_for(dataset: Dataset, streams: int, mix: int, lookahead_bytes: int) -> int:
    """Return for how many shards a rank with `streams` streams has room.

    These are the shards that its streams are in, and as many ahead as `lookahead_bytes` hold, at least one block.
    """
    packed = dataset.encoding == "packed"
    largest = int(dataset.shards.images.max()) * dataset.image_bytes if packed else int(dataset.shards.bytes.max())
    return streams * mix + max(mix, min(lookahead_bytes // largest, MOST_AHEAD))


class Lookahead:
    """Which shards this rank's streams enter next, in the order in which they are needed, up to offset `end`."""

    def __init__(self, order: Shuffle, streams: range, offset: int, end: int = ENDLESS) -> None:
        self._entered: dict[int, tuple[int, ...]] = {}
        self._visits: Iterator[Visit] = takewhile(
            lambda visit: visit.offset < end, merge(*(order.visits(stream, offset) for stream in streams))
        )
        self._coming: deque[Visit] = deque()
        self._last: dict[int, None] = {}

    @property
    def entered(self) -> set[int]:
        """The shards that the streams are in."""
        return set(chain.from_iterable(self._entered.values()))

    def wanted(self, needed: list[int], offset: int, limit: int) -> list[int] | None:
        """Return at most `limit` shards to hold: `needed`, those the streams are in at `offset`, those that follow.

        None means that the answer is the one before.
        """
        entered = False
        while (visit := self._peek(0)) is not None and visit.offset <= offset:
            self._coming.popleft()
            self._entered[visit.stream] = visit.shards
            entered = True
        if not entered and all(shard in self._last for shard in needed):
            return None
        wanted = dict.fromkeys([*needed, *chain.from_iterable(self._entered.values())])
        position = 0
        while len(wanted) < limit and position < 4 * limit and (visit := self._peek(position)) is not None:
            wanted.update(dict.fromkeys(visit.shards))
            position += 1
        self._last = dict.fromkeys(islice(wanted, limit))
        return list(self._last)

    def _peek(self, position: int) -> Visit | None:
        while len(self._coming) <= position:
            if (visit := next(self._visits, None)) is None:
                return None
            self._coming.append(visit)
        return self._coming[position]
