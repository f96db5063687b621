"""Sampling, encoding and writing at the same time, so that a GPU never waits for the other two.

The caller's thread runs the sampler and sorts images into their shards; processes encode, a pool of threads hashes
and writes. A GPU works ahead meanwhile. What is on the way is bounded, so memory is too.
"""

import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from deploy.generation.encoding import Encoders
from deploy.generation.plan import Plan, ShardRange
from pipeline.common.imaging import Pixels
from pipeline.common.randomness import Purpose
from pipeline.data.shard_writer import Members, ShardWriter
from pipeline.model.latents import latents

WRITERS = 4
"""Shards that are written at a time."""
PIECE_IMAGES = 256
"""Images that an encoder takes at a time, or a few more."""

Finish = Callable[[ShardRange, ShardWriter], None]
Spent = Callable[[str, float], None]


class SampleStream(Protocol):
    """The part of export.samplers.base.Sampler that is needed here."""

    device: str

    def stream(self, blocks: Iterator[NDArray[np.float32]]) -> Iterator[Pixels]:
        """Yield the images of each block of z."""
        ...


def produce(
    sampler: SampleStream,
    plan: Plan,
    shards: Sequence[ShardRange],
    finish: Finish,
    *,
    encoders: int,
    stop: threading.Event,
    spent: Spent = lambda phase, seconds: None,
    made: Callable[[int], None] = lambda images: None,
) -> None:
    """Make the images of `shards` (ascending) and hand each full shard to `finish`, which runs in a thread.

    When `stop` is set, the shard in hand is given up, those being written are finished, and this returns.
    `spent(phase, seconds)` is told the time of every piece of work (sample, encode, write), from several
    threads; `made(images)` how many images were put into shards. The first error of any of them is raised.
    """
    # On a CPU the encoders have the sampler's cores. It rests then: both at once are slower, because the threads of
    # a sampler wait for each other wherever one of them gives way.
    rest = sampler.device == "cpu"
    with _Assembly(plan, finish, encoders, rest, spent, made) as assembly:
        firsts = [block * plan.block_images for block in needed_blocks(shards, plan.block_images)]
        blocks = sampler.stream(block_latents(plan, first) for first in firsts)
        began = time.perf_counter()
        for first, images in zip(firsts, blocks, strict=True):
            spent("sample", time.perf_counter() - began)
            if stop.is_set():
                break
            for shard, part in cut(shards, first, images):
                assembly.add(shard, part)
            began = time.perf_counter()
        else:
            assembly.collect(all=True)
        assembly.wait()


class _Assembly:
    """Has pieces encoded, puts them into shards in order, and writes full shards in a pool of threads."""

    def __init__(
        self,
        plan: Plan,
        finish: Finish,
        encoders: int,
        rest: bool,
        spent: Spent,
        made: Callable[[int], None],
    ) -> None:
        self._plan, self._finish, self._rest, self._spent, self._made = plan, finish, rest, spent, made
        image_bytes = plan.image_size**2 * plan.channels
        self._encoders = (
            None
            if plan.format == "packed"
            else Encoders(encoders, plan.format, plan.quality, images=2 * PIECE_IMAGES, image_bytes=image_bytes)
        )
        self._writing = ThreadPoolExecutor(WRITERS, "writer")
        self._written: deque[Future[None]] = deque()
        self._open: list[Pixels] = []  # to be the next piece
        self._open_images = 0
        self._given = 0  # images of the newest shard in pieces
        self._owners: deque[ShardRange] = deque()  # of the pieces with the encoders
        self._parts: list[list[Pixels] | Members] = []  # of the shard in hand
        self._have = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._writing.shutdown(cancel_futures=True)
        finally:  # a second Ctrl-C comes here too: the encoders end only when their pipes are closed
            if self._encoders is not None:
                self._encoders.__exit__(kind, error, traceback)

    def add(self, shard: ShardRange, images: Pixels) -> None:
        """Take the next images; waits while too much is on the way."""
        self._open.append(images)
        self._open_images += len(images)
        last = self._given + self._open_images == shard.images
        if not last and self._open_images < PIECE_IMAGES:
            return
        if self._encoders is None:
            self._put(shard, self._open, self._open_images)
        else:
            self._encoders.put(self._open, shard.prefix, self._given, shard.start + self._given)
            self._owners.append(shard)
            self.collect(all=self._rest and self._encoders.busy)
        self._given = 0 if last else self._given + self._open_images
        self._open, self._open_images = [], 0

    def collect(self, all: bool = False) -> None:
        """Put into their shards the pieces that are encoded, and wait for one if no encoder is free; or for all."""
        while self._encoders and self._encoders.waiting and (all or self._encoders.ready or self._encoders.full):
            members, seconds = self._encoders.get()
            self._spent("encode", seconds)
            self._put(self._owners.popleft(), members, members.images)

    def wait(self) -> None:
        """Wait until all full shards are written."""
        while self._written:
            self._written.popleft().result()

    def _put(self, shard: ShardRange, part: list[Pixels] | Members, images: int) -> None:
        """Add the next part to the shard in hand, and have the shard written when it is full."""
        self._parts.append(part)
        self._have += images
        self._made(images)
        if self._have == shard.images:
            while len(self._written) >= WRITERS:
                self._written.popleft().result()
            self._written.append(self._writing.submit(self._write, shard, self._parts))
            self._parts, self._have = [], 0

    def _write(self, shard: ShardRange, parts: Sequence[list[Pixels] | Members]) -> None:
        began = time.perf_counter()
        writer = ShardWriter(shard.prefix, self._plan.format, [], limit_bytes=None)  # the plan says how many images
        for part in parts:
            if isinstance(part, Members):
                writer.add_members(part)
                continue
            for images in part:
                first = shard.start + writer.images
                writer.add_all(images, [f"{index:012d}" for index in range(first, first + len(images))])
        self._finish(shard, writer)
        self._spent("write", time.perf_counter() - began)


def block_latents(plan: Plan, first: int) -> NDArray[np.float32]:
    """Return z of the whole block that begins at image `first`: blocks are never cut, so no cut of a range shows."""
    return latents(plan.seed, Purpose.SAMPLE, first, plan.block_images, plan.latent_dim, plan.latent_distribution)


def needed_blocks(shards: Sequence[ShardRange], block_images: int) -> Iterator[int]:
    """Yield the numbers of the sampler's blocks that hold any image of `shards` (ascending), each once."""
    after = 0
    for shard in shards:
        end = (shard.end - 1) // block_images + 1
        yield from range(max(after, shard.start // block_images), end)
        after = end


def cut(shards: Sequence[ShardRange], first: int, images: Pixels) -> Iterator[tuple[ShardRange, Pixels]]:
    """Yield (shard, images) for the parts of a block that `shards` (ascending) need."""
    for position in range(bisect_right(shards, first, key=lambda shard: shard.end), len(shards)):
        shard = shards[position]
        low, high = max(shard.start, first), min(shard.end, first + len(images))
        if low >= high:
            return
        for begin in range(low, high, PIECE_IMAGES):
            yield shard, images[begin - first : min(begin + PIECE_IMAGES, high) - first]
