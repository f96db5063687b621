"""Cache of remote shards on the local disk: bounded by a limit and by its volume, shared by processes.

It evicts what was read longest ago.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from pipeline.common.errors import TryAgainError, UsageError
from pipeline.common.storage import Store, atomic_path, made_directory, remove_abandoned, sha256_bytes, spare_bytes
from pipeline.data.dataset import Dataset, Shard

DEFAULT_LIMIT_GIB = 16.0
SCAN_SHARE = 1 / 256
"""Of the limit: what a process downloads before it looks again whether the cache is too large."""


def default_directory() -> Path:
    """Return `$DCGAN_CACHE`, else the user's cache folder. Raises UsageError for a user without a home."""
    if chosen := os.environ.get("DCGAN_CACHE"):
        return Path(chosen)
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "dcgan" / "shards"
    try:
        return Path.home() / ".cache" / "dcgan" / "shards"
    except RuntimeError:
        raise UsageError(
            f"user {os.getuid()} has no home folder for the cache of shards: set DCGAN_CACHE to a folder"
        ) from None


def default_limit_bytes() -> int:
    """Return `$DCGAN_CACHE_GIB` in bytes, else 16 GiB. Raises UsageError when it is no positive number."""
    text = os.environ.get("DCGAN_CACHE_GIB") or str(DEFAULT_LIMIT_GIB)
    try:
        limit = int(float(text) * (1 << 30))
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise UsageError(f"DCGAN_CACHE_GIB={text}: expected the size of the cache of shards in GiB, above 0")
    return limit


class ShardCache:
    """At most `limit_bytes` of shards in `directory`, each under its SHA-256, so that equal shards are one file.

    Some of its volume stays free (`spare_bytes`). A shard for which there is no room is read, and not kept.

    That of an indexed tar is not of all its bytes: there the ETag is in the name as well.

    The cache does not verify its files. The reader does, and calls `drop` for a damaged one.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
        self._unscanned_bytes = limit_bytes  # the first download looks what is there

    def open(self, dataset: Dataset, shard: Shard, *, keep: bool = True) -> FileIO:
        """Return the shard's open file; download it first if it is absent. An open file survives its eviction.

        Without `keep`, a download is a file in memory, and is gone when it is closed.
        """
        path = self._path(shard)
        # Of a tar of others no checksum covers the pixels: only what was synced is whole after a power failure.
        durable = dataset.encoding == "tar"
        while True:
            try:
                file = FileIO(path, "r")
            except FileNotFoundError:
                store, name = dataset.place(shard)
                room = keep and self._has_room(shard.bytes)
                if keep and not room and dataset.encoding == "tar":  # of any size, so it is not for the memory
                    raise TryAgainError(
                        f"{self.directory}: no room for {name} ({shard.bytes:,} bytes); free some space on this "
                        "volume, or set DCGAN_CACHE to a folder on a larger one"
                    ) from None
                if not room and hasattr(os, "memfd_create"):  # elsewhere than on Linux, they are kept
                    return _in_memory(store, name)
                self._download(store, name, path, durable)
                continue
            with suppress(FileNotFoundError):  # `_evict` sorts by access time, which mounts may not keep
                os.utime(path, ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
            return file

    def _has_room(self, needed: int) -> bool:
        """Whether the volume has room for `needed` bytes, if necessary in place of shards read longest ago."""
        if (lacking := needed - spare_bytes(self.directory)) <= 0:
            return True
        if self.directory.is_dir():
            with self._locked("evict"):
                self._remove_oldest(self._entries(), lacking)
        return needed <= spare_bytes(self.directory)

    def drop(self, shard: Shard) -> None:
        """Remove a shard whose copy is damaged."""
        self._path(shard).unlink(missing_ok=True)

    def _path(self, shard: Shard) -> Path:
        name = shard.sha256 if shard.etag is None else sha256_bytes(f"{shard.sha256} {shard.etag}".encode())
        return self.directory / f"{name}.tar"

    def _download(self, store: Store, name: str, path: Path, durable: bool) -> None:
        with self._locked(path.stem):  # so that processes do not fetch a shard twice
            if path.exists():
                return
            with atomic_path(path, durable=durable) as temporary:
                store.fetch(name, temporary)
                self._unscanned_bytes += temporary.stat().st_size
        if self._unscanned_bytes > self.limit_bytes * SCAN_SHARE:
            self._unscanned_bytes = 0
            with self._locked("evict"):
                self._evict(keep=path)

    def _evict(self, keep: Path) -> None:
        """Remove the shards read longest ago until the rest fits, and what killed processes left half-written."""
        remove_abandoned(self.directory)
        entries = [entry for entry in self._entries() if entry[2] != keep]
        if keep.exists():
            held = keep.stat().st_size + sum(size for _, size, _ in entries)
            self._remove_oldest(entries, held - self.limit_bytes)

    def _entries(self) -> list[tuple[int, int, Path]]:
        """Return (time of the last access, bytes, path) of every shard that is kept."""
        entries = []
        for path in self.directory.glob("*.tar"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                entries.append((stat.st_atime_ns, stat.st_size, path))
        return entries

    def _remove_oldest(self, entries: list[tuple[int, int, Path]], excess: int) -> None:
        """Remove the shards read longest ago until `excess` bytes are gone."""
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        path = self.directory / f"{name}.lock"
        while True:
            with made_directory(self.directory):
                try:
                    file = path.open("w")
                except FileNotFoundError:  # after a failed first download, its process has just removed the folder
                    continue
                with file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    if os.fstat(file.fileno()).st_nlink:  # else its last holder has just removed it
                        try:
                            yield
                        finally:
                            path.unlink(missing_ok=True)
                        return


def _in_memory(store: Store, name: str) -> FileIO:
    """Return a file of a store, downloaded into memory.

    A temporary file on a disk would be written to it: ext4 does so when a file that was opened anew is closed.
    """
    handle = os.memfd_create(name)
    try:
        store.fetch(name, Path(f"/proc/self/fd/{handle}"))
        return FileIO(handle, "r")
    except BaseException:
        os.close(handle)
        raise


def open_cache(directory: Path | None) -> ShardCache:
    """Return the cache in `directory`, by default the user's: as large as the environment says and its volume allows.

    Raises UsageError where the environment gives no folder or no size.
    """
    cache = ShardCache(directory or default_directory(), default_limit_bytes())
    room = sum(size for _, size, _ in cache._entries()) + spare_bytes(cache.directory)
    cache.limit_bytes = max(1, min(cache.limit_bytes, room))
    return cache
