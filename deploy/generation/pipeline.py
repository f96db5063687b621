"""The generation pipeline: sampling, encoding and writing overlap, so that a GPU never waits for the other two.

The caller's thread runs the sampler and puts images into their shards. Processes encode. A pool of threads hashes
and writes. The number of images in flight is bounded, and so is memory.
"""

import math
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from deploy.generation.encoding import Encoders
from deploy.generation.plan import Plan, ShardRange
from pipeline.common.imaging import Pixels, reframe
from pipeline.common.randomness import Purpose
from pipeline.common.shapes.frame import Frame, sound
from pipeline.data.shard_writer import Members, ShardWriter
from pipeline.model.latents import latents

WRITERS = 4
"""Shards written at the same time."""
PIECE_IMAGES = 256
"""Images in a piece, the unit of encoding; the last blocks put in may make it a little larger."""

Finish = Callable[[ShardRange, ShardWriter], None]
"""Stores a full shard."""
ReportTime = Callable[[str, float], None]
"""Told the phase (sample, encode or write) and its seconds."""
ReportImages = Callable[[int], None]
"""Told how many more images are in shards."""


class SampleStream(Protocol):
    """The part of export.samplers.base.Sampler that the pipeline uses."""

    device: str

    def stream(self, blocks: Iterator[NDArray[np.float32]]) -> Iterator[Pixels]:
        """Yield the images of each block of rows: z, and a label behind it."""
        ...


def generate_shards(
    sampler: SampleStream,
    plan: Plan,
    shards: Sequence[ShardRange],
    finish: Finish,
    *,
    encoders: int,
    stop: threading.Event,
    given: NDArray[np.float32] | None = None,
    report_time: ReportTime = lambda phase, seconds: None,
    report_images: ReportImages = lambda images: None,
) -> None:
    """Make the images of `shards` (ascending) and hand each full shard to `finish`, which runs in a thread.

    `given` are the z (count, latent_dim) of the whole generation, where they are not those of the plan's seed.
    Once `stop` is set, this drops the unfinished shard, finishes those that are being written, and returns.
    `report_time` is called from several threads. The first error of sampling, encoding or writing is raised.
    """
    # On a CPU, encoders and sampler share the cores, and both at once are slower than in turns: the threads of a
    # sampler wait for each other whenever one of them loses its core.
    in_turns = sampler.device == "cpu"
    with _ShardAssembler(plan, finish, encoders, in_turns, report_time, report_images) as assembler:
        firsts = [block * plan.block_images for block in needed_blocks(shards, plan.block_images)]
        blocks = image_blocks(sampler, plan, firsts, given)
        began = time.perf_counter()
        for first, images in zip(firsts, blocks, strict=True):
            report_time("sample", time.perf_counter() - began)
            if stop.is_set():
                break
            for shard, part in cut(shards, first, images):
                assembler.add(shard, part)
            began = time.perf_counter()
        else:
            assembler.collect(all=True)
        assembler.wait()


class _ShardAssembler:
    """Sends pieces to the encoders, puts the results into shards in order, and writes full shards in threads."""

    def __init__(
        self,
        plan: Plan,
        finish: Finish,
        encoders: int,
        in_turns: bool,
        report_time: ReportTime,
        report_images: ReportImages,
    ) -> None:
        self._plan, self._finish, self._in_turns = plan, finish, in_turns
        self._report_time, self._report_images = report_time, report_images
        image_bytes = math.prod(plan.image_shape)
        self._encoders = (
            None
            if plan.format == "packed"
            else Encoders(
                encoders,
                plan.format,
                plan.quality,
                images=2 * PIECE_IMAGES,
                image_bytes=image_bytes,
                label_names=list(plan.label_types),
            )
        )
        self._writing = ThreadPoolExecutor(WRITERS, "writer")
        self._written: deque[Future[None]] = deque()
        self._open: list[Pixels] = []  # blocks of the next piece
        self._open_images = 0
        self._given = 0  # images of the newest shard that are in pieces already
        self._owners: deque[ShardRange] = deque()  # the shard of each piece that is with the encoders
        self._parts: list[list[Pixels] | Members] = []  # of the unfinished shard
        self._have = 0  # images in these

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._writing.shutdown(cancel_futures=True)
        finally:  # after a second Ctrl-C too: the encoders exit only when their pipes are closed
            if self._encoders is not None:
                self._encoders.__exit__(kind, error, traceback)

    def add(self, shard: ShardRange, images: Pixels) -> None:
        """Take the next images of `shard`. Waits while too many are in flight."""
        self._open.append(images)
        self._open_images += len(images)
        last = self._given + self._open_images == shard.images
        if not last and self._open_images < PIECE_IMAGES:
            return
        if self._encoders is None:
            self._put(shard, self._open, self._open_images)
        else:
            first = shard.start + self._given
            labels = self._plan.label_values(first, self._open_images) if self._plan.labels else None
            self._encoders.put(self._open, shard.prefix, self._given, first, labels)
            self._owners.append(shard)
            self.collect(all=self._in_turns and self._encoders.busy)
        self._given = 0 if last else self._given + self._open_images
        self._open, self._open_images = [], 0

    def collect(self, all: bool = False) -> None:
        """Put encoded pieces into their shards. Waits for one piece if no encoder is free, or with `all` for all."""
        while self._encoders and self._encoders.waiting and (all or self._encoders.ready or self._encoders.full):
            members, seconds = self._encoders.get()
            self._report_time("encode", seconds)
            self._put(self._owners.popleft(), members, members.images)

    def wait(self) -> None:
        """Wait until all full shards are written."""
        while self._written:
            self._written.popleft().result()

    def _put(self, shard: ShardRange, part: list[Pixels] | Members, images: int) -> None:
        """Add the next part to the unfinished shard, and send the shard to a writer when it is full."""
        self._parts.append(part)
        self._have += images
        self._report_images(images)
        if self._have == shard.images:
            while len(self._written) >= WRITERS:
                self._written.popleft().result()
            self._written.append(self._writing.submit(self._write, shard, self._parts))
            self._parts, self._have = [], 0

    def _write(self, shard: ShardRange, parts: Sequence[list[Pixels] | Members]) -> None:
        began = time.perf_counter()
        names = list(self._plan.label_types)
        writer = ShardWriter(shard.prefix, self._plan.format, names, limit_bytes=None)  # the plan limits the images
        for part in parts:
            if isinstance(part, Members):
                writer.add_members(part)
                continue
            for images in part:
                first = shard.start + writer.images
                labels = self._plan.label_values(first, len(images)) if names else None
                writer.add_all(images, [f"{index:012d}" for index in range(first, first + len(images))], labels)
        self._finish(shard, writer)
        self._report_time("write", time.perf_counter() - began)


def image_blocks(
    sampler: SampleStream, plan: Plan, firsts: Iterable[int], given: NDArray[np.float32] | None
) -> Iterator[Pixels]:
    """Yield the images of the whole blocks that begin at `firsts`, as the plan has them.

    No color of RGBA is larger than its alpha, which a network does not know, and images that the plan has in another
    size than the network are stretched to it.
    """
    frame = Frame(plan.image_size, plan.channels, fit="stretch")
    for made in sampler.stream(block_rows(plan, first, given) for first in firsts):
        images = sound(made) if plan.channels == 4 else made
        yield images if images.shape[1:] == plan.image_shape else np.stack([reframe(image, frame) for image in images])


def block_rows(plan: Plan, first: int, given: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Return the rows of the whole block that begins at image `first`: z, and behind it a conditional model's labels.

    z are those of the seed, or the `given`, then zeros. Blocks are always whole, so an image does not depend on the
    range that it was made in.
    """
    if given is not None:
        block = np.zeros((plan.block_images, plan.latent_dim), np.float32)
        rows = given[first : first + plan.block_images]
        block[: len(rows)] = rows
    else:
        block = latents(plan.seed, Purpose.SAMPLE, first, plan.block_images, plan.latent_dim, plan.latent_distribution)
    if plan.labels is None:
        return block
    return np.concatenate([block, plan.labels.columns(plan.seed, first, plan.block_images)], 1)


def needed_blocks(shards: Sequence[ShardRange], block_images: int) -> Iterator[int]:
    """Yield once each the index of every block that holds an image of `shards` (ascending)."""
    after = 0
    for shard in shards:
        end = (shard.end - 1) // block_images + 1
        yield from range(max(after, shard.start // block_images), end)
        after = end


def cut(shards: Sequence[ShardRange], first: int, images: Pixels) -> Iterator[tuple[ShardRange, Pixels]]:
    """Yield (shard, images) for each shard of `shards` (ascending) that needs images of this block, piece by piece.

    `first` is the index of the block's first image.
    """
    for position in range(bisect_right(shards, first, key=lambda shard: shard.end), len(shards)):
        shard = shards[position]
        low, high = max(shard.start, first), min(shard.end, first + len(images))
        if low >= high:
            return
        for begin in range(low, high, PIECE_IMAGES):
            yield shard, images[begin - first : min(begin + PIECE_IMAGES, high) - first]
