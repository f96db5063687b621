"""A data set that lies in the device's memory: a batch is a gather of rows, and nothing is read meanwhile."""

import re
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.common.errors import ConfigConflict
from pipeline.common.progress import Progress
from pipeline.common.ranks import Ranks
from pipeline.config import RunConfig
from pipeline.data.dataset import Dataset
from pipeline.data.loading.loader import Loader, lookahead_bytes, mix_of, run_loader
from pipeline.data.loading.shuffle import Indices, InOrder, Shuffle, check_division
from pipeline.data.loading.thread_pool import ThreadPool

RESERVE_SHARE = 0.25
"""Of the device's free memory: what is left to training. The networks' weights are there already."""
CHUNK_BYTES = 16 << 20
"""Images that travel to the device together while the set is loaded."""
LOCATED_IMAGES = 8192
"""Images that are located, and whose places are uploaded, at once."""


class DeviceLoader:
    """What `Loader` is, for a data set that is in the device's memory: the same images in the same order.

    `images` are all of the data set, uint8 (N, H, W, C), in its own order. The other arguments are those of `Loader`.
    Raises ConfigConflict as `Loader` does.
    """

    def __init__(
        self,
        dataset: Dataset,
        images: Tensor,
        *,
        seed: int,
        streams: int,
        batch: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        mix: int = 1,
    ) -> None:
        check_division(batch, streams, world_size, dataset.images)
        self.dataset, self.images = dataset, images
        self.batch, self.rank, self.world_size = batch, rank, world_size
        self.position = start
        """Images handed out so far over all ranks."""
        self.wait_seconds = 0.0
        """No caller of `next_batch` waits for data."""
        self.prefetched_images = len(images)
        self.resident_bytes = images.nbytes
        self._shuffle = Shuffle(dataset.shards.images, seed=seed, streams=streams, mix=mix)
        self._located_batches = max(1, LOCATED_IMAGES * world_size // batch)
        self._thread = ThreadPool(1, "locator")
        self._block, self._used = torch.empty(0), self._located_batches
        self._next = self._locate_ahead(start)

    @property
    def footprint(self) -> str:
        """Where its images are, for the log."""
        return f"all of them in the memory of {self.images.device}, {self.resident_bytes / 1e6:,.0f} MB"

    def next_batch(self) -> Tensor:
        """Return this rank's share of the next global batch, uint8 (batch / world_size, H, W, C), on the device."""
        return self.images.index_select(0, self.next_rows())

    def next_rows(self) -> Tensor:
        """Return which of `images` are this rank's share of the next global batch, int64, on the device.

        The host does not wait for the device. The rows stay as they are while the caller holds them.
        """
        if self._used == self._located_batches:
            located = torch.from_numpy(self._next.result())
            if self.images.is_cuda:
                located = located.pin_memory()  # its allocator keeps the memory until the copy is done
            self._block, self._used = located.to(self.images.device, non_blocking=True), 0
            self._next = self._locate_ahead(self.position + self._located_batches * self.batch)
        rows = self._block[self._used]
        self._used += 1
        self.position += self.batch
        return rows

    def ids(self, images_seen: int | None = None) -> Indices:
        """Return the data-set indices of this rank's share of the batch after `images_seen` (default: the next)."""
        return self._locate(self.position if images_seen is None else images_seen, 1).reshape(-1)

    def close(self) -> None:
        """Let go of the images, and end the thread."""
        self._thread.close()
        self.images = self.images[:0]

    def __enter__(self) -> "DeviceLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _locate_ahead(self, start: int) -> "Future[Indices]":
        return self._thread.submit(lambda: self._locate(start, self._located_batches))

    def _locate(self, start: int, batches: int) -> Indices:
        """Return the data-set indices of `batches` batches after `start` images, int64 (batches, share)."""
        first = start + (self.rank - start) % self.world_size
        images = np.arange(first, start + batches * self.batch, self.world_size, dtype=np.int64)
        return self._shuffle.ids(images).reshape(batches, -1)


AnyLoader = Loader | DeviceLoader


def open_loader(
    config: RunConfig,
    dataset: Dataset,
    device: torch.device,
    start: int,
    ranks: Ranks,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    loaded: Callable[[int], None] = lambda _: None,
) -> AnyLoader:
    """Return what gives a rank of a run its images from image `start` on, by `runtime.data`.

    A set that goes into the device's memory is loaded here, which may take minutes: each wait for a part of it is
    inside `waiting()`, and `loaded` gets the number of images so far; what it raises ends the loading.

    Raises ConfigConflict for runtime.data=device when the set does not fit, and what `Loader` raises; DataError for a
    shard that is damaged or missing.
    """
    recipe, schedule = config.recipe, config.schedule
    check_division(recipe.batch, recipe.streams, ranks.world_size, dataset.images)
    if not _goes_on_device(config, dataset, device, start, ranks.world_size):
        end = start + -(-max(0, schedule.total_images - start) // recipe.batch) * recipe.batch
        return run_loader(config, dataset, start=start, rank=ranks.rank, world_size=ranks.world_size, end=end)
    with Progress("loading the data set", dataset.images) if ranks.rank == 0 else nullcontext() as progress:

        def advance(images: int) -> None:
            if progress is not None:
                progress.advance(images - progress.done)
            loaded(images)

        images = load_images(
            dataset,
            device,
            threads=config.runtime.loader_threads,
            lookahead=lookahead_bytes(config),
            waiting=waiting,
            loaded=advance,
        )
    return DeviceLoader(
        dataset,
        images,
        seed=recipe.seed,
        streams=recipe.streams,
        batch=recipe.batch,
        start=start,
        rank=ranks.rank,
        world_size=ranks.world_size,
        mix=mix_of(config, dataset),
    )


def load_images(
    dataset: Dataset,
    device: torch.device,
    *,
    threads: int = 2,
    lookahead: int = 0,
    cache_dir: Path | None = None,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    loaded: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Return all images of a data set in its own order, uint8 (N, H, W, C), on `device`.

    Shards are read and decoded as for training: verified, by `threads`, with `lookahead` bytes of them ahead.
    """
    images = torch.empty((dataset.images, *dataset.image_shape), dtype=torch.uint8, device=device)
    with Loader(
        dataset,
        seed=0,
        streams=1,
        batch=max(1, CHUNK_BYTES // dataset.image_bytes),
        threads=threads,
        cache_dir=cache_dir,
        resident_limit=0,
        lookahead_bytes=lookahead,
        end=dataset.images,
        order=InOrder(dataset.shards.images),
    ) as loader:
        done = 0
        while done < dataset.images:
            with waiting():
                chunk = torch.from_numpy(loader.next_batch())
            images[done : done + len(chunk)].copy_(chunk, non_blocking=True)
            done += len(chunk)
            loaded(done)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # so that the images are there for every stream
    return images


def _goes_on_device(config: RunConfig, dataset: Dataset, device: torch.device, start: int, world_size: int) -> bool:
    """Whether the set is to be loaded into the device's memory. Raises ConfigConflict when it must and does not fit."""
    if config.runtime.data == "stream" or (config.runtime.data == "auto" and device.type != "cuda"):
        return False
    needed, free = dataset.images * dataset.image_bytes, free_bytes(device)
    fits = needed <= (1 - RESERVE_SHARE) * free
    if config.runtime.data == "auto":
        # Each rank reads the whole set then, and by streaming only its share of the images that are left.
        return fits and config.schedule.total_images - start >= dataset.images * world_size
    if not fits:
        raise ConfigConflict(
            f"runtime.data=device: the {dataset.images:,} images of {dataset.location} need {needed / 1e9:.2f} GB, and "
            f"{device} has {free / 1e9:.2f} GB free, {RESERVE_SHARE:.0%} of which stay free for training; "
            "use runtime.data=stream"
        )
    return True


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device; of the CPU, that of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert available is not None
    return int(available[1]) << 10
