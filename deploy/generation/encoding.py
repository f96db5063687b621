"""Processes that encode images. In threads, the interpreter's lock would let one core at a time build tars and JSON.

Images go to a process, and the members of the shard come back, through shared memory; a pipe carries the rest. The
memory has no name, so it does not use the 64 MB of a container's /dev/shm.
"""

import ctypes
import mmap
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from types import TracebackType
from typing import Any, Self

import numpy as np

from pipeline.common.errors import TryAgainError
from pipeline.common.imaging import Format, Pixels, encode
from pipeline.data.shard_writer import Members, ShardWriter

MEMBER_BYTES = 3 * 1024
"""Space for an image's headers, .json and padding, and for a file a little larger than its pixels."""
SLOTS = 2
"""Pieces that a process may hold: the one that it encodes, and the next one, so that it never waits."""
KEPT_BYTES = 32 << 20
"""Freed memory that a process keeps instead of returning it to the kernel."""
KILLED = (
    "an encoder process was killed, most likely because memory ran out; "
    "run the same command again, with fewer --encoders, to resume"
)


@dataclass(frozen=True)
class Piece:
    """Consecutive images of one shard, sent to an encoder."""

    slot: int
    prefix: str
    """Prefix of the shard's members."""
    number: int
    """Position of the first image in the shard."""
    index: int
    """Index of the first image in the generation."""
    shape: tuple[int, ...]
    """(n, height, width, channels)."""
    labels: Sequence[Sequence[Any]] | None
    """Values of the labels of each image."""


class Encoders:
    """`count` processes that take pieces of at most `images` images in turn, so that results come back in order."""

    def __init__(
        self,
        count: int,
        format: Format,
        quality: int | None,
        *,
        images: int,
        image_bytes: int,
        label_names: Sequence[str] = (),
    ) -> None:
        keep_freed_memory()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])
        room = images * (image_bytes + MEMBER_BYTES)
        self._all = [_Encoder(context, format, quality, room, label_names) for _ in range(count)]
        self._put = self._got = 0

    @property
    def waiting(self) -> int:
        """Pieces that were put in and not taken out yet."""
        return self._put - self._got

    @property
    def busy(self) -> bool:
        """Whether every process has a piece."""
        return self.waiting >= len(self._all)

    @property
    def full(self) -> bool:
        """Whether a piece must be taken out before another is put in."""
        return self.waiting == SLOTS * len(self._all)

    @property
    def ready(self) -> bool:
        """Whether `get` would not have to wait."""
        return bool(self.waiting) and self._all[self._got % len(self._all)].connection.poll()

    def put(
        self,
        images: list[Pixels],
        prefix: str,
        number: int,
        index: int,
        labels: Sequence[Sequence[Any]] | None = None,
    ) -> None:
        """Send `images` to an encoder: blocks (n, height, width, channels) uint8, which may change afterwards.

        The first image is at position `number` of the shard with that prefix, and has index `index` in the generation.
        `labels` are the values of each, in the order of `label_names`.
        Raises TryAgainError when the process was killed.
        """
        assert not self.full
        turn, place = divmod(self._put, len(self._all))
        shape = (sum(map(len, images)), *images[0].shape[1:])
        self._all[place].put(images, Piece(turn % SLOTS, prefix, number, index, shape, labels))
        self._put += 1

    def get(self) -> tuple[Members, float]:
        """Return the shard's members of the oldest piece, and the seconds that encoding took.

        Raises the encoder's own error, or TryAgainError when the process was killed.
        """
        turn, place = divmod(self._got, len(self._all))
        self._got += 1
        return self._all[place].get(turn % SLOTS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for encoder in self._all:
            encoder.connection.close()
        for encoder in self._all:
            encoder.process.join()


class _Encoder:
    def __init__(
        self, context: Any, format: Format, quality: int | None, room: int, label_names: Sequence[str]
    ) -> None:
        self._room = room
        handle = _nameless_memory()
        os.ftruncate(handle, SLOTS * room)
        self._memory = memoryview(mmap.mmap(handle, SLOTS * room))
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve,
            args=(theirs, _Handle(handle), room, format, quality, label_names),
            name="encoder",
            daemon=True,
        )
        self.process.start()
        os.close(handle)
        theirs.close()

    def put(self, images: list[Pixels], piece: Piece) -> None:
        np.concatenate(images, out=_pixels(self._memory, self._room, piece))
        try:
            self.connection.send(piece)
        except OSError:
            raise TryAgainError(KILLED) from None

    def get(self, slot: int) -> tuple[Members, float]:
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise TryAgainError(KILLED) from None
        if isinstance(answer, BaseException):
            raise answer
        members, seconds = answer
        if not members.pieces:
            begin = slot * self._room
            members = replace(members, pieces=[bytes(self._memory[begin : begin + members.length])])
        return members, seconds


def _pixels(memory: memoryview, room: int, piece: Piece) -> Pixels:
    """Return a piece's images as a view of the shared memory."""
    count = int(np.prod(piece.shape))
    return np.frombuffer(memory, np.uint8, count, piece.slot * room).reshape(piece.shape)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory: to ask the kernel for it again costs as much as building a piece's tar."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-1, KEPT_BYTES)  # M_TRIM_THRESHOLD
        mallopt(-3, KEPT_BYTES)  # M_MMAP_THRESHOLD


def _nameless_memory() -> int:
    """Return the descriptor of an empty, unnamed file; it is in memory where the system supports that."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("dcgan-encoder")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class _Handle:
    """A file descriptor that can be sent to a new process."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __reduce__(self) -> tuple[Any, ...]:
        return _detach, (DupFd(self.handle),)


def _detach(handle: Any) -> int:
    return int(handle.detach())


def _serve(
    connection: Connection, handle: int, room: int, format: Format, quality: int | None, label_names: Sequence[str]
) -> None:
    """Encode pieces until the parent closes the pipe or dies."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent handles these, and lets pieces in progress finish
        signal.signal(number, signal.SIG_IGN)
    keep_freed_memory()
    memory = memoryview(mmap.mmap(handle, SLOTS * room))
    options = {} if quality is None else {"quality": quality}
    while True:
        try:
            piece: Piece = connection.recv()
        except (EOFError, OSError):
            return
        try:
            began = time.perf_counter()
            images = _pixels(memory, room, piece)
            writer = ShardWriter(piece.prefix, format, label_names, limit_bytes=None)
            keys = [f"{index:012d}" for index in range(piece.index, piece.index + len(images))]
            writer.add_all((encode(image, format, **options) for image in images), keys, piece.labels)
            members = writer.members(piece.number)
            if members.length <= room:  # else, which hardly ever happens, they go through the pipe
                begin = piece.slot * room
                memory[begin : begin + members.length] = b"".join(members.pieces)
                members = replace(members, pieces=[])
            connection.send((members, time.perf_counter() - began))
        except BaseException as error:
            connection.send(error)
