"""The tars of an indexed data set: opened and verified, their images decoded as a build would."""

import logging
import os
from functools import cached_property
from io import FileIO
from pathlib import Path

from pipeline.common.errors import DataError
from pipeline.common.imaging import BadImage, Pixels, load_image
from pipeline.data.dataset import Dataset
from pipeline.data.index.scan import verify_headers
from pipeline.data.loading.shard_cache import ShardCache, open_cache

REPLACEMENTS = 100
"""Images tried in place of one that cannot be decoded, before its tar is refused."""

log = logging.getLogger(__name__)

Identity = tuple[int, int, int]


class Tars:
    """Opens the tars of an indexed data set, and decodes their images. Copies of remote tars lie in the shard cache.

    Raises DataError when the sidecar is damaged, or places images outside their tars.
    """

    def __init__(self, dataset: Dataset, cache_dir: Path | None) -> None:
        self.dataset = dataset
        self._cache_dir = cache_dir
        self._frame = dataset.frame
        self._first = dataset.shard_starts
        self._offsets, self._sizes = dataset.columns.offset, dataset.columns.size
        self._verified: dict[int, Identity] = {}
        self._replaced: set[int] = set()

    @cached_property
    def _cache(self) -> ShardCache:
        return open_cache(self._cache_dir)

    def open(self, shard: int) -> FileIO:
        """Return a tar's open file, verified unless the same file was before. Raises DataError that names the tar."""
        entry = self.dataset.shards[shard]
        store, name = self.dataset.place(entry)
        if not store.remote:
            try:
                return self._verify(shard, FileIO(store.path(name)))
            except FileNotFoundError:
                raise DataError(
                    f"{store.path(name)}: this tar of the data set is missing; index the tars again"
                ) from None
        if shard not in self._verified and entry.etag is not None:
            etag = store.facts(name).etag
            if etag != entry.etag:
                raise DataError(
                    f"{store.path(name)}: changed: its ETag is {etag}, and was {entry.etag}; index the tars again"
                )
        try:
            return self._verify(shard, self._cache.open(self.dataset, entry))
        except DataError:
            self._cache.drop(entry)  # damaged in the cache or in transit: read once more from the store
            return self._verify(shard, self._cache.open(self.dataset, entry))

    def _verify(self, shard: int, file: FileIO) -> FileIO:
        identity = _identity(file.fileno())
        if self._verified.get(shard) != identity:
            try:
                verify_headers(file, self.dataset.shards[shard], self._where(shard))
            except BaseException:
                file.close()
                raise
            self._verified[shard] = identity
        return file

    def decode(self, shard: int, row: int, handle: int, out: Pixels) -> None:
        """Write the image at `row` of a tar, whose open file is `handle`, into `out`, uint8 (H, W, C).

        One that cannot be decoded is replaced by the next of its tar that can: a rule that depends on the data alone,
        so that every rank and every restart sees the same. Raises DataError when none of REPLACEMENTS can.
        """
        count = self._first[shard + 1] - self._first[shard]
        for step in range(min(count, 1 + REPLACEMENTS)):
            member = self._first[shard] + (row + step) % count
            size = int(self._sizes[member])
            data = os.pread(handle, size, int(self._offsets[member]))
            try:
                out[:] = load_image(data, self._frame)
            except BadImage as error:
                if _identity(handle) != self._verified[shard]:
                    raise DataError(f"{self._where(shard)}: changed while it was read; index the tars again") from None
                self._say_replaced(shard, member, error)
                continue
            return
        raise DataError(
            f"{self._where(shard)}: {min(count, 1 + REPLACEMENTS)} images in a row cannot be decoded, the last of them "
            f"{self._key(member)}; copy or download the tar again"
        )

    def _say_replaced(self, shard: int, member: int, error: BadImage) -> None:
        if member not in self._replaced:
            self._replaced.add(member)
            log.warning(
                "%s: %s cannot be used: %s; the next image of the tar stands for it",
                self._where(shard),
                self._key(member),
                error,
            )

    def _where(self, shard: int) -> str:
        store, name = self.dataset.place(self.dataset.shards[shard])
        return store.path(name)

    def _key(self, member: int) -> str:
        return self.dataset.columns.key.slice(member, member + 1)[0]


def _identity(handle: int) -> Identity:
    """Return what changes when a file does: its size, the time of its last change, its number."""
    stat = os.fstat(handle)
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
