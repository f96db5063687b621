"""Training batches: image i of a run is a pure function of (seed, i), read ahead by threads.

See docs/architecture.md, contract 3.
"""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch

from pipeline.config import RunConfig
from pipeline.data.dataset import Dataset
from pipeline.data.loading.lookahead import ENDLESS, Lookahead, slots_for
from pipeline.data.loading.shard_buffer import ShardBuffer
from pipeline.data.loading.shuffle import Indices, Shuffle, check_division
from pipeline.data.loading.slots import Images, SlotBuffer
from pipeline.data.loading.tar_buffer import ResidentTars, TarBuffer
from pipeline.data.loading.thread_pool import ThreadPool

RESIDENT_BYTES = 512 << 20
"""A data set whose decoded images need no more than this is decoded once and stays in memory."""

MIX_INDEXED = 4
"""`recipe.mix_shards` of indexed data sets, chosen by benchmarks/mixing.py; the order of a build is shuffled."""

PREFETCH = 4
"""Batches made ahead of the caller."""

CLOSE_SECONDS = 2.0
"""Longest wait for threads to end. Only a thread that reads from a hanging store needs longer."""

MISALIGNMENT = 32
"""Batches begin at half this offset: libjpeg-turbo writes aligned rows past the cache, which is 8 % slower."""

LOCATED_IMAGES = 8192
"""Images that are located at once: numpy's fixed costs vanish among so many."""


Batch = tuple[Images, list[Future[None]]]
"""Images, and the copies that must end before all of the images are there."""


class Loader:
    """This rank's share of every global batch, endlessly: uint8 NHWC of batch / world_size images.

    `batch` is global; `start` is the number of images seen so far over all ranks, the one integer of state.
    Rank r owns the streams s with s mod world_size = r, and so the images i with i mod world_size = r, in order.
    A stream draws from `mix` shards at once. Beyond the shards that the streams are in, as many more are held as
    `lookahead_bytes` allow, at least `mix`. `end` is the number of images of the whole run, a multiple of `batch`:
    nothing is read beyond. `order` takes the place of the shuffle.

    The shards of a remote data set are cached on disk under `cache_dir` (default: `shard_cache.default_directory`),
    if the run can need them again and the cache can keep them until then.

    Raises ConfigConflict when `streams` does not divide `batch`, `world_size` does not divide `streams`, or there
    are fewer images than streams; DataError when dataset.json contradicts itself. An error in a thread is raised by
    `next_batch`; that of a shard, by the first batch that needs it.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        streams: int,
        batch: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 2,
        cache_dir: Path | None = None,
        resident_limit: int = RESIDENT_BYTES,
        mix: int = 1,
        lookahead_bytes: int = 0,
        end: int = ENDLESS,
        order: Shuffle | None = None,
    ) -> None:
        self.dataset = dataset
        check_division(batch, streams, world_size, dataset.images)
        self.batch, self.streams, self.rank, self.world_size = batch, streams, rank, world_size
        self.position = start
        """Images handed out so far over all ranks."""
        self.wait_seconds = 0.0
        """Total time that callers of `next_batch` have waited for data."""
        self._shuffle = order or Shuffle(dataset.shards.images, seed=seed, streams=streams, mix=mix)
        self._end = end
        self._in_use: set[int] = set()
        self._shape = self.dataset.image_shape
        self._pinned = torch.cuda.is_available()

        resident = self.dataset.images * self.dataset.image_bytes <= resident_limit
        slots = len(dataset.shards) if resident else slots_for(dataset, streams // world_size, mix, lookahead_bytes)
        self._buffer = _open_buffer(dataset, slots, resident, cache_dir)
        self.resident_bytes = self._buffer.nbytes + (PREFETCH + 1) * (batch // world_size) * self.dataset.image_bytes
        """Upper bound of its memory: the buffer of shards and the batches made ahead."""
        # Rows are gathered by the producer thread itself, at the speed of memory; decoding is cut over threads.
        self._decoders = None if self._buffer.rows_kept else ThreadPool(threads, "decoder")
        self._threads = threads

        self._ready: SimpleQueue[Batch | BaseException] = SimpleQueue()
        self._item: Batch | BaseException | None = None
        self._room = threading.Semaphore(PREFETCH)
        self._closed = False
        self._failure: BaseException | None = None
        self._producer = threading.Thread(target=self._run, args=(start,), name="loader", daemon=True)
        self._producer.start()

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield `next_batch()` as torch tensors, endlessly; in pinned memory when CUDA is there."""
        while True:
            yield torch.from_numpy(self.next_batch())

    def next_batch(self) -> Images:
        """Return this rank's share of the next global batch, uint8 (batch / world_size, H, W, C). It is never reused.

        Raises the UserError that stopped the loader, at this call and at every later one.
        """
        if self._failure is not None:
            raise self._failure
        before = time.perf_counter()
        try:
            # Kept until it is whole, so that an interrupt while waiting loses no batch.
            self._item = self._item or self._ready.get()
            if isinstance(self._item, BaseException):
                raise self._item
            images, copies = self._item
            for copy in copies:
                copy.result()
        except Exception as error:
            self._failure = error
            raise
        finally:
            self.wait_seconds += time.perf_counter() - before
        self._item = None
        self._room.release()
        self.position += self.batch
        return images

    def ids(self, images_seen: int | None = None) -> Indices:
        """Return the data-set indices of this rank's share of the batch after `images_seen` (default: the next)."""
        return self._shuffle.ids(self._images(self.position if images_seen is None else images_seen, 1))

    @property
    def footprint(self) -> str:
        """Where its images are, for the log."""
        return f"at most {self.resident_bytes / 1e6:,.0f} MB of them in memory"

    @property
    def prefetched_images(self) -> int:
        """Images at hand now beyond those of the shards in use, of which some may have been handed out."""
        ahead = [shard for shard in self._buffer.loaded() if self._buffer.holds_all or shard not in self._in_use]
        ready = self._ready.qsize() * (self.batch // self.world_size)
        return int(self._shuffle.sizes[ahead].sum()) + ready

    def close(self) -> None:
        """End the threads, except one that waits for a hanging store. After this, `next_batch` raises RuntimeError."""
        self._closed = True
        self._failure = self._failure or RuntimeError("the loader is closed")
        self._room.release()
        self._ready.put(self._failure)
        self._buffer.close()
        if self._decoders is not None:
            self._decoders.close()
        # Joined, because a thread inside C++ code when the interpreter ends takes the process down with SIGABRT.
        until = time.monotonic() + CLOSE_SECONDS
        self._producer.join(CLOSE_SECONDS)
        self._buffer.join(until)
        if self._decoders is not None:
            self._decoders.join(until)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _images(self, start: int, batches: int) -> Indices:
        """Return which images of the run are this rank's in `batches` global batches after `start` images, int64."""
        first = start + (self.rank - start) % self.world_size
        return np.arange(first, start + batches * self.batch, self.world_size, dtype=np.int64)

    def _run(self, start: int) -> None:
        """Make batches until closed, or up to the end; an error is handed over in place of a batch."""
        try:
            self._make_batches(start)
            self._ready.put(RuntimeError(f"the run ends at image {self._end}"))
        except BaseException as error:
            self._ready.put(error)

    def _make_batches(self, start: int) -> None:
        share = self.batch // self.world_size
        end = -(-self._end // self.streams)
        ahead = Lookahead(self._shuffle, range(self.rank, self.streams, self.world_size), start // self.streams, end)
        located_batches = 1
        while start < self._end:
            images = self._images(start, located_batches)
            images = images[images < self._end]
            shards, rows = self._shuffle.locate(images)
            offsets = images // self.streams
            for first in range(0, len(images), share):
                self._room.acquire()
                if self._closed:
                    return
                one = slice(first, first + share)
                self._buffer.comes_back = self._shuffle.comes_back(int(offsets[first]), end)
                self._ready.put(self._make(shards[one], rows[one], offsets[one], ahead))
            start += located_batches * self.batch
            located_batches = min(2 * located_batches, max(1, LOCATED_IMAGES // share))

    def _make(self, shards: Indices, rows: Indices, offsets: Indices, ahead: Lookahead) -> Batch:
        """Return the batch of the images at `rows` of `shards`."""
        images = self._empty(len(shards))
        copies: list[Future[None]] = []
        if self._buffer.complete and self._decoders is None:
            self._buffer.copy(shards, rows, self._buffer.bases(shards), images)
            return images, copies
        for begin, end, needed in self._segments(shards):
            if (wanted := ahead.wanted(needed, int(offsets[end - 1]), self._buffer.slots)) is not None:
                self._buffer.hold(wanted)
                self._in_use = ahead.entered
            self._buffer.wait(needed)
            bases = self._buffer.bases(shards[begin:end])
            step = -(-(end - begin) // self._threads) if self._decoders else end - begin
            for cut in range(0, end - begin, step):
                here, there = slice(cut, cut + step), slice(begin + cut, min(begin + cut + step, end))
                copy = partial(self._buffer.copy, shards[there], rows[there], bases[here], images[there])
                if self._decoders is None:
                    copy()
                else:
                    copies.append(self._decoders.submit(copy))
            self._buffer.read_by(copies)
        return images, copies

    def _segments(self, shards: Indices) -> Iterator[tuple[int, int, list[int]]]:
        """Cut a batch where it needs more shards than the buffer has slots: yield (begin, end, shards)."""
        begin = 0
        needed: dict[int, None] = {}
        # Nearly always one segment: `dict.fromkeys` keeps the shards in the order of their first use.
        if len(whole := dict.fromkeys(shards.tolist())) <= self._buffer.slots:
            yield 0, len(shards), list(whole)
            return
        for index, shard in enumerate(shards.tolist()):
            if shard not in needed and len(needed) == self._buffer.slots:
                yield begin, index, list(needed)
                begin, needed = index, {}
            needed[shard] = None
        yield begin, len(shards), list(needed)

    def _empty(self, count: int) -> Images:
        """Return an uninitialized batch, which torch's caching allocator pins when CUDA is there."""
        size = count * self.dataset.image_bytes
        if self._pinned:
            # From the block's beginning: by that address alone does torch's allocator know, when the caller copies
            # the batch to the GPU and lets go of it, that its memory must not be given away before the copy is done.
            pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            return pinned.numpy().reshape(count, *self._shape)
        flat = np.empty(size + MISALIGNMENT, np.uint8)
        skip = (MISALIGNMENT // 2 - flat.ctypes.data) % MISALIGNMENT
        return flat[skip : skip + size].reshape(count, *self._shape)


def _open_buffer(dataset: Dataset, slots: int, resident: bool, cache_dir: Path | None) -> SlotBuffer:
    """Return what holds the shards: decoded for good if `resident`, else `slots` of them at a time."""
    if dataset.encoding != "tar":
        return ShardBuffer(dataset, slots=slots, decode=resident, cache_dir=cache_dir)
    return ResidentTars(dataset, cache_dir) if resident else TarBuffer(dataset, slots, cache_dir)


def run_loader(
    config: RunConfig, dataset: Dataset, *, start: int, rank: int, world_size: int, end: int = ENDLESS
) -> Loader:
    """Return the loader of one rank of a training run that has seen `start` images, and ends with `end`."""
    return Loader(
        dataset,
        seed=config.recipe.seed,
        streams=config.recipe.streams,
        batch=config.recipe.batch,
        start=start,
        rank=rank,
        world_size=world_size,
        threads=config.runtime.loader_threads,
        mix=mix_of(config, dataset),
        lookahead_bytes=lookahead_bytes(config),
        end=end,
    )


def mix_of(config: RunConfig, dataset: Dataset) -> int:
    """Return the number of shards that a stream of a run draws from at once."""
    return config.recipe.mix_shards or (MIX_INDEXED if dataset.encoding == "tar" else 1)


def lookahead_bytes(config: RunConfig) -> int:
    """Return this process's share of the memory that a run may take on each machine for shards read ahead."""
    return (config.runtime.lookahead_mb << 20) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
