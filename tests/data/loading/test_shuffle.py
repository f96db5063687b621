"""Image i of a run must be a pure function of (seed, i) that covers every epoch, and must never change."""

from itertools import islice, takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.common.errors import ConfigConflict
from pipeline.data.loading.shuffle import Shuffle, check_division

shard_sizes = st.lists(st.integers(1, 30), min_size=1, max_size=9)
# Image i of a run over shards of 5, 3 and 8 images, seed 11, 3 streams: what runs in the wild rest on.
GOLDEN = [6, 11, 13, 5, 15, 1, 7, 10, 2, 9, 14, 3, 8, 12, 0, 1, 14, 8, 2, 11, 12, 0, 9, 10]
# The same with the images of two shards shuffled together.
GOLDEN_MIXED = [12, 10, 15, 6, 11, 1, 5, 9, 2, 14, 7, 3, 8, 13, 0, 1, 11, 10, 2, 15, 12, 9, 4, 14]


def order_of(sizes: list[int], seed: int, streams: int, mix: int = 1) -> Shuffle:
    return Shuffle(sizes, seed=seed, streams=min(streams, sum(sizes)), mix=mix)


def test_the_order_never_changes_between_versions() -> None:
    assert Shuffle([5, 3, 8], seed=11, streams=3).ids(np.arange(24)).tolist() == GOLDEN
    assert Shuffle([5, 3, 8], seed=11, streams=3, mix=2).ids(np.arange(24)).tolist() == GOLDEN_MIXED


@given(shard_sizes, st.integers(0, 2**64 - 1), st.integers(1, 20), st.integers(0, 5), st.integers(1, 6))
def test_each_epoch_has_equal_ranges_without_repeats(
    sizes: list[int], seed: int, streams: int, epoch: int, mix: int
) -> None:
    order = order_of(sizes, seed, streams, mix)
    length = order.range_images * order.streams
    assert length == sum(sizes) // order.streams * order.streams
    ids = order.ids(np.arange(epoch * length, (epoch + 1) * length))
    assert len(np.unique(ids)) == length
    assert 0 <= ids.min() <= ids.max() < sum(sizes)


def test_epochs_differ_and_leave_over_other_images() -> None:
    order = Shuffle([40, 20, 31, 8], seed=5, streams=16)  # 99 images: 96 a pass
    epochs = [order.ids(np.arange(96 * e, 96 * (e + 1))) for e in range(8)]
    left_over = [frozenset(range(99)) - frozenset(ids.tolist()) for ids in epochs]
    assert all(len(left) == 3 for left in left_over)
    assert len(set(left_over)) == 8
    assert len(frozenset().union(*left_over)) > 15
    assert len({tuple(ids) for ids in epochs}) == 8


def test_shards_and_images_inside_them_are_shuffled() -> None:
    order = Shuffle([50] * 20, seed=1, streams=1)
    shards, rows = order.locate(np.arange(1000))
    assert (np.diff(shards) != 0).sum() == 19, "a stream reads each shard once, in one go"
    assert shards[::50].tolist() != sorted(shards[::50])
    inside = rows.reshape(20, 50)
    assert (np.sort(inside, 1) == np.arange(50)).all()
    assert len({tuple(line) for line in inside}) == 20, "every shard has an order of its own"


def test_mixed_shards_are_shuffled_together_and_read_in_one_go() -> None:
    order = Shuffle([50] * 22, seed=1, streams=1, mix=4)
    shards, rows = order.locate(np.arange(1100))
    blocks = [shards[start : start + 200] for start in range(0, 1100, 200)]
    assert [len(np.unique(block)) for block in blocks] == [4, 4, 4, 4, 4, 2], "the last block holds the rest"
    for block in blocks[:-1]:
        halves = np.bincount(block[:100], minlength=22)
        assert (halves[halves > 0] < 45).all(), "the images of one shard are spread over the block"
    assert len({*zip(shards.tolist(), rows.tolist(), strict=True)}) == 1100


def test_seeds_give_unrelated_orders() -> None:
    one, two = (Shuffle([60, 40], seed=seed, streams=4).ids(np.arange(100)) for seed in (0, 1))
    assert (one == two).mean() < 0.1


@given(shard_sizes, st.integers(0, 99), st.integers(1, 20), st.integers(0, 200), st.integers(1, 60), st.integers(1, 6))
def test_visits_tell_every_shard_that_locate_finds(
    sizes: list[int], seed: int, streams: int, start: int, length: int, mix: int
) -> None:
    order = order_of(sizes, seed, streams, mix)
    stream = seed % order.streams
    shards, _ = order.locate(np.arange(start, start + length) * order.streams + stream)
    visits = list(takewhile(lambda visit: visit.offset < start + length, islice(order.visits(stream, start), length)))
    assert visits[0].offset == start
    ends = [visit.offset for visit in visits[1:]] + [start + length]
    told = [visit.shards for visit, end in zip(visits, ends, strict=True) for _ in range(visit.offset, end)]
    assert all(shard in among for shard, among in zip(shards.tolist(), told, strict=True))
    assert all(len(among) <= mix for among in told)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=40), shard_sizes)
def test_any_image_can_be_asked_for_alone(images: list[int], sizes: list[int]) -> None:
    order = order_of(sizes, 7, 4)
    together = order.ids(np.array(images))
    alone = [int(order_of(sizes, 7, 4).ids(np.array([image]))[0]) for image in images]
    assert together.tolist() == alone


@pytest.mark.parametrize(
    ("batch", "streams", "world_size", "images", "told"),
    [
        (100, 16, 1, 1000, ["streams=16", "batch=100", "nearest batch that works: 96"]),
        (5, 16, 1, 1000, ["nearest batch that works: 16"]),
        (128, 16, 1, 5, ["streams=16", "5 images", "most that work for recipe.batch=128: 4"]),
        (128, 16, 3, 1000, ["3 processes", "streams=16", "nearest process count that works: 2"]),
        (128, 16, 32, 1000, ["32 processes", "nearest process count that works: 16"]),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_that_does(
    batch: int, streams: int, world_size: int, images: int, told: list[str]
) -> None:
    with pytest.raises(ConfigConflict) as caught:
        check_division(batch, streams, world_size, images)
    assert all(words in str(caught.value) for words in told), caught.value


@settings(max_examples=500)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40), st.integers(1, 60))
def test_the_nearest_that_works_does_work(batch: int, streams: int, world_size: int, images: int) -> None:
    for _ in range(4):  # one number is mended at a time
        try:
            return check_division(batch, streams, world_size, images)
        except ConfigConflict as refusal:
            near = int(str(refusal).rsplit(" ", 1)[1])
            if "nearest batch" in str(refusal):
                batch = near
            elif "images of the data set" in str(refusal):
                streams = near
            else:
                world_size = near
    pytest.fail("the suggestions do not lead to a run")
