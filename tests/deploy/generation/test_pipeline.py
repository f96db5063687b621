"""Sampling, encoding and writing overlap within bounds, in order, and end on every error."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from deploy.generation.pipeline import PIECE_IMAGES, cut, generate_shards, needed_blocks
from deploy.generation.plan import Plan, ShardRange, default_shard_images
from pipeline.common.errors import TryAgainError
from pipeline.data.dataset import Encoding, Shard
from pipeline.data.shard_writer import ShardWriter

BLOCK = 64


class Numbered:
    """A sampler whose image i is filled with i mod 251; notes how many blocks it was asked for."""

    device = "none"

    def __init__(self, plan: Plan, fail_at: int = -1) -> None:
        self.plan, self.fail_at, self.blocks = plan, fail_at, 0

    def stream(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        first = self.plan.start - self.plan.start % BLOCK
        for _ in blocks:
            if self.blocks == self.fail_at:
                raise TryAgainError("the device is gone")
            values = (np.arange(first, first + BLOCK) % 251).astype(np.uint8)
            shape = (BLOCK, self.plan.image_size, self.plan.image_size, self.plan.channels)
            yield np.broadcast_to(values[:, None, None, None], shape)
            first += BLOCK
            self.blocks += 1


def plan(count: int, shard_images: int, start: int = 0, size: int = 8, format: Encoding = "packed") -> Plan:
    return Plan(
        model_sha256="0" * 64,
        backend="none",
        block_images=BLOCK,
        seed=0,
        start=start,
        count=count,
        latent_dim=1,
        latent_distribution="uniform",
        image_size=size,
        channels=3,
        format=format,
        quality=90 if format == "jpg" else None,
        shard_images=shard_images,
    )


def run(
    plan: Plan, sampler: Numbered | None = None, stop: threading.Event | None = None
) -> dict[int, tuple[bytes, Shard]]:
    shards: dict[int, tuple[bytes, Shard]] = {}

    def finish(shard: ShardRange, writer: ShardWriter) -> None:
        pieces, entry = writer.finish(f"{shard.start}.tar")
        shards[shard.start] = b"".join(pieces), entry

    generate_shards(sampler or Numbered(plan), plan, plan.shards(), finish, encoders=2, stop=stop or threading.Event())
    return dict(sorted(shards.items()))


def pixels(shards: dict[int, tuple[bytes, Shard]]) -> list[int]:
    size = 8 * 8 * 3
    values: list[int] = []
    for data, shard in shards.values():
        for offset, length in zip(shard.offsets, shard.sizes, strict=True):
            block = np.frombuffer(data, np.uint8, length, offset).reshape(-1, size)
            assert (block == block[:, :1]).all()
            values += block[:, 0].tolist()
    return values


@pytest.mark.parametrize(
    ("start", "count", "shard_images"), [(0, 1000, 96), (37, 500, 64), (63, 2, 1), (5, 3000, 1000)]
)
def test_every_image_once_and_in_order(start: int, count: int, shard_images: int) -> None:
    shards = run(plan(count, shard_images, start))
    assert pixels(shards) == [index % 251 for index in range(start, start + count)]
    assert [first % shard_images for first in list(shards)[1:]] == [0] * (len(shards) - 1)


def test_a_shard_may_be_larger_than_the_default_limit() -> None:
    big = plan(3000, 3000, size=64)
    ((data, shard),) = run(big).values()
    assert len(data) > 32_000_000
    assert shard.images == 3000


def test_the_default_keeps_to_the_limit() -> None:
    for side in (32, 64, 128):
        packed = plan(default_shard_images(side * side * 3, "packed"), 1 << 20, size=side)
        ((data, _),) = run(packed).values()
        assert 8_000_000 < len(data) <= 32_000_000


def test_an_error_of_the_sampler_ends_everything() -> None:
    work = plan(100_000, 1000)
    with pytest.raises(TryAgainError, match="device is gone"):
        run(work, Numbered(work, fail_at=20))


def test_an_error_in_writing_ends_everything() -> None:
    work = plan(1_000_000, 100)
    sampler = Numbered(work)

    def finish(shard: ShardRange, writer: ShardWriter) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        generate_shards(sampler, work, work.shards(), finish, encoders=1, stop=threading.Event())
    assert sampler.blocks < 15_000


def test_a_slow_disk_bounds_what_is_in_memory() -> None:
    work = plan(1_000_000, 100, size=64)
    sampler, stop, release = Numbered(work), threading.Event(), threading.Event()

    def stop_and_release() -> None:
        while sampler.blocks < 4:
            time.sleep(0.01)
        time.sleep(1)  # for as many more as there may come
        stop.set()
        release.set()

    def finish(shard: ShardRange, writer: ShardWriter) -> None:
        release.wait()

    threading.Thread(target=stop_and_release, daemon=True).start()
    generate_shards(sampler, work, work.shards(), finish, encoders=1, stop=stop)
    assert 4 <= sampler.blocks < 12  # the shards that are being written, and those in hand


def test_stopped_it_gives_up_the_shard_in_hand_only() -> None:
    work = plan(10_000_000, 100)
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    shards = run(work, stop=stop)
    values = pixels(shards)
    assert len(values) == 100 * len(shards) < 10_000_000
    assert values == [index % 251 for index in range(len(values))]


def test_on_a_cpu_the_sampler_rests_while_the_encoders_work() -> None:
    work = plan(20_000, 4_096, format="jpg")
    sampler = Numbered(work)
    finished: dict[str, dict[int, bytes]] = {"cpu": {}, "none": {}}
    for device, shards in finished.items():
        sampler.device, sampler.blocks = device, 0
        lags: list[int] = []
        done = 0

        def finish(shard: ShardRange, writer: ShardWriter, shards: dict[int, bytes] = shards) -> None:
            shards[shard.start] = b"".join(writer.finish("x.tar")[0])

        def report_images(images: int, lags: list[int] = lags) -> None:
            nonlocal done
            done += images
            lags.append(sampler.blocks * BLOCK - done)

        generate_shards(
            sampler, work, work.shards(), finish, encoders=2, stop=threading.Event(), report_images=report_images
        )
        if device == "cpu":  # both encoders had a piece, and nothing was sampled before they had given them back
            assert max(lags) < 2 * PIECE_IMAGES
    assert finished["cpu"] == finished["none"]
    assert len(finished["cpu"]) == 5


def test_only_blocks_that_are_needed_are_sampled() -> None:
    shards = [ShardRange(10, 70), ShardRange(70, 80), ShardRange(1000, 1001)]
    assert list(needed_blocks(shards, 64)) == [0, 1, 15]
    images = np.arange(64, dtype=np.uint8).reshape(64, 1, 1, 1)
    found = [(shard.start, piece.ravel().tolist()) for shard, piece in cut(shards, 64, images)]
    assert found == [(10, list(range(6))), (70, list(range(6, 16)))]
