"""Blocks are made in a thread, one ahead, in order; errors and the end reach whoever takes the items."""

import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import count, islice

import pytest

from pipeline.training.update.ahead import Ahead


def test_items_come_in_order_and_one_block_is_made_ahead() -> None:
    made: list[int] = []
    third = threading.Event()

    def blocks() -> Iterator[range]:
        for start in count(0, 3):
            made.append(start)
            if len(made) == 3:
                third.set()
            yield range(start, start + 3)

    with closing(Ahead(blocks())) as items:
        assert list(islice(items, 4)) == [0, 1, 2, 3]
        assert third.wait(60), "the third block is made when the second is begun"
        assert list(islice(items, 8)) == [*range(4, 12)]
        assert len(made) <= 5


def test_an_error_comes_where_its_block_was_due() -> None:
    def blocks() -> Iterator[list[int]]:
        yield [1, 2]
        raise ValueError("damaged")

    with closing(Ahead(blocks())) as items:
        assert list(islice(items, 2)) == [1, 2]
        with pytest.raises(ValueError, match="damaged"):
            next(items)


def test_it_ends_with_the_last_block() -> None:
    with closing(Ahead(iter([[1], [2], [3]]))) as items:
        assert list(items) == [1, 2, 3]


def test_closing_ends_the_thread() -> None:
    before = set(threading.enumerate())
    items = Ahead(iter(lambda: [0], None))
    assert next(items) == 0
    items.close()
    assert set(threading.enumerate()) <= before
