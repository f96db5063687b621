"""Which shards are at hand: a fixed number of slots, filled by threads ahead of those who read from them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import TryAgainError, describe_os_error
from pipeline.data.loading.thread_pool import ThreadPool

Images = NDArray[np.uint8]

LOAD_THREADS = 16
"""Shards loaded at once, at most. As many are as slots wait for one: in the long run, as the store's latency needs."""


class SlotBuffer(ABC):
    """At most `slots` of `shards` shards, each in a slot of its own. What a slot holds is the subclass's business.

    A shard that differs from dataset.json raises DataError from `wait`, before any of its images are used.
    """

    rows_kept: bool
    """Whether slots hold decoded images: then `copy` takes no time that threads could share."""
    nbytes: int
    """Memory that the slots, and shards on their way into them, take at most."""
    comes_back = True
    """Whether the run may need the shards of the next `hold` again, when they have left their slots."""

    def __init__(self, shards: int, slots: int) -> None:
        self._shards = shards
        self._holder: list[int | None] = [None] * min(slots, shards)
        self._slot_of = np.full(shards, -1, np.int64)
        self._loads: dict[int, Future[None]] = {}
        self._readers: list[Future[None]] = []
        self._complete = False
        self._threads = ThreadPool(min(LOAD_THREADS, self.slots), "shard-loader")

    @property
    def slots(self) -> int:
        """Number of shards that it can hold."""
        return len(self._holder)

    @property
    def holds_all(self) -> bool:
        """Whether there is a slot for each shard; then a shard's slot has its own number, and is filled once."""
        return self.slots == self._shards

    def hold(self, shards: Sequence[int]) -> None:
        """Begin to load those of `shards` (distinct, at most `slots`) that are absent, into slots that hold others."""
        wanted = set(shards)
        free = (slot for slot, holder in enumerate(self._holder) if holder not in wanted)
        for shard in shards:
            if shard in self._loads:
                continue
            slot = shard if self.holds_all else next(free)
            self._readers = [reader for reader in self._readers if not reader.done()]
            before = list(self._readers)
            if (old := self._holder[slot]) is not None:
                before.append(self._loads.pop(old))
            self._holder[slot] = shard
            self._slot_of[shard] = slot
            self._loads[shard] = self._threads.submit(partial(self._load_after, before, shard, slot))

    def wait(self, shards: Iterable[int]) -> None:
        """Return when all of `shards`, which must be held, are loaded. Raises the error of a load that failed.

        So an error is raised where the shard is needed, not ahead of that. What the store failed to give ahead of
        time is asked for once more: it may have recovered.
        """
        for shard in shards:
            load = self._loads[shard]
            if load.done() and not load.cancelled() and isinstance(load.exception(), TryAgainError):
                slot = int(self._slot_of[shard])
                load = self._loads[shard] = self._threads.submit(partial(self._load_after, [], shard, slot))
            load.result()

    def loaded(self) -> list[int]:
        """Return the shards that are there, as far as they are at this moment; for any thread."""
        return [
            shard
            for shard, load in list(self._loads.items())
            if load.done() and not load.cancelled() and load.exception() is None
        ]

    @property
    def complete(self) -> bool:
        """Whether all shards are loaded; then they stay loaded."""
        if not self._complete and len(self._loads) == self._shards:
            self._complete = all(load.done() and not load.exception() for load in self._loads.values())
        return self._complete

    def read_by(self, readers: Iterable["Future[None]"]) -> None:
        """Overwrite no slot before `readers` are done."""
        if not self.holds_all:  # else no slot is ever overwritten, and they would pile up
            self._readers.extend(readers)

    @abstractmethod
    def bases(self, shards: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the contents of loaded `shards` are, for `copy`. Valid until `hold` drops the shards."""

    @abstractmethod
    def copy(self, shards: NDArray[np.int64], rows: NDArray[np.int64], bases: NDArray[np.int64], out: Images) -> None:
        """Write the images at `rows` of `shards` (n), which are at `bases`, into `out`, uint8 (n, H, W, C)."""

    def close(self) -> None:
        """Stop loading."""
        self._threads.close()

    def join(self, until: float) -> None:
        """Wait for the threads to end, but not beyond `time.monotonic()` = `until`."""
        self._threads.join(until)

    def _load_after(self, before: list["Future[None]"], shard: int, slot: int) -> None:
        """Load `shard`, once nothing reads or writes in its slot any more."""
        wait(before)
        try:
            self._load(shard, slot)
        except OSError as error:
            raise describe_os_error(error) from error

    @abstractmethod
    def _load(self, shard: int, slot: int) -> None:
        """Fill `slot` with `shard`, verified. Raises DataError when it is not what dataset.json says."""
