"""The order of a listing that may be larger than memory: a radix sort, by the digits of uniform hashes, on disk."""

from collections.abc import Iterable, Iterator
from itertools import islice
from operator import itemgetter
from typing import Any

from pipeline.data.spool import Spool

SORTED_ROWS = 1 << 19
"""Pictures that are sorted in memory, some 200 MB of them. Of more, each run holds those with one first digit."""
DIGITS = 256

HASH_BYTES = 8

Row = tuple[bytes, tuple[Any, ...], Any]
"""A picture: its hash with its key in UTF-8 behind it, labels, where."""


def in_order(rows: Iterable[Row], digit: int = 0) -> Iterator[Row]:
    """Yield `rows` by hash, and those of one hash by key. All have the same digits before number `digit`.

    Uniform hashes make even runs: of 100 million pictures, each of 256 has 390,000, and is sorted when its turn comes.
    """
    rows = iter(rows)
    held = list(islice(rows, SORTED_ROWS))
    if len(held) < SORTED_ROWS or digit == HASH_BYTES:
        held += rows
        held.sort(key=itemgetter(0))
        yield from held
        return
    runs: list[Spool[Row]] = [Spool(memory_bytes=1) for _ in range(DIGITS)]
    while held:
        parts: list[list[Row]] = [[] for _ in range(DIGITS)]
        for row in held:
            parts[row[0][digit]].append(row)
        for run, part in zip(runs, parts, strict=True):
            run.extend(part)
        del parts
        held = list(islice(rows, SORTED_ROWS))
    for run in runs:
        yield from in_order(run, digit + 1)
        run.close()
