"""Sequences that may be larger than memory: they grow at their end, and lie in a temporary file once they are large."""

import pickle
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Generic, Self, TypeVar

CHUNK = 1024
"""Items that are written and read together."""
SPOOL_BYTES = 32 << 20
"""What is kept in memory, packed: about 400,000 pictures. The file of more has no name, so that a kill removes it."""

T = TypeVar("T")


class Spool(Generic[T]):
    """A sequence of values that pickle. It is appended to, walked through any number of times, and read by position.

    Its file lies in $TMPDIR. Nothing is unpickled but what this process has written there.
    """

    def __init__(self, values: Iterable[T] = (), *, memory_bytes: int | None = None) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=memory_bytes or SPOOL_BYTES)  # noqa: SIM115
        self._starts, self._counts = array("q", [0]), array("q", [0])
        self._open: list[T] = []
        self.extend(values)

    def __len__(self) -> int:
        return self._counts[-1] + len(self._open)

    def append(self, value: T) -> None:
        """Add a value."""
        self._open.append(value)
        if len(self._open) >= CHUNK:
            self.flush()

    def extend(self, values: Iterable[T]) -> None:
        """Add some values."""
        values = iter(values)
        while some := list(islice(values, CHUNK - len(self._open))):
            self._open += some
            if len(self._open) >= CHUNK:
                self.flush()

    def __iadd__(self, values: Iterable[T]) -> Self:
        self.extend(values)
        return self

    def flush(self) -> None:
        """Move what was added last to the file."""
        if self._open:
            data = self._pack(self._open)
            self._counts.append(len(self))
            self._open = []
            try:
                self._file.seek(self._starts[-1])
                self._file.write(data)
            except OSError as error:
                error.filename = error.filename or tempfile.gettempdir()
                raise
            self._starts.append(self._starts[-1] + len(data))

    def __iter__(self) -> Iterator[T]:
        for chunk in range(len(self._starts) - 1):
            yield from self._chunk(chunk)
        yield from list(self._open)

    def slice(self, start: int, stop: int) -> list[T]:
        """Return the values from `start` to before `stop`."""
        self.flush()
        found: list[T] = []
        chunk = bisect_right(self._counts, start) - 1
        first = self._counts[chunk]
        while chunk < len(self._starts) - 1 and self._counts[chunk] < stop:
            found += self._chunk(chunk)
            chunk += 1
        return found[start - first : stop - first]

    def close(self) -> None:
        """Free the memory and the disk."""
        self._file.close()

    def _chunk(self, chunk: int) -> list[T]:
        self._file.seek(self._starts[chunk])
        return self._unpack(self._file.read(self._starts[chunk + 1] - self._starts[chunk]))

    def _pack(self, values: list[T]) -> bytes:
        return pickle.dumps(values, pickle.HIGHEST_PROTOCOL)

    def _unpack(self, data: bytes) -> list[T]:
        values: list[T] = pickle.loads(data)
        return values
