"""Encoder processes return what encoding in this process returns, and no process outlives the work."""

import os
import signal

import numpy as np
import psutil
import pytest

from deploy.generation import encoding
from deploy.generation.encoding import Encoders
from pipeline.common.errors import TryAgainError
from pipeline.common.imaging import Format, encode
from pipeline.data.shard_writer import Members, ShardWriter

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)


def content(members: Members) -> bytes:
    return b"".join(members.pieces)


def encode_one(encoders: Encoders) -> Members:
    encoders.put([IMAGES], "shard", 0, 0)
    return encoders.get()[0]


def test_pieces_come_back_in_order_however_long_each_takes() -> None:
    large = np.random.default_rng(1).integers(0, 256, (1, 512, 512, 3), dtype=np.uint8)
    with Encoders(3, "png", None, images=1, image_bytes=large.nbytes) as encoders:
        given = taken = 0
        sizes = []
        while taken < 40:
            while given < 40 and not encoders.full:
                encoders.put([large if given % 4 == 0 else large[:, :1, : given + 1]], "shard", given, given)
                given += 1
            assert encoders.waiting == given - taken
            assert encoders.busy == (encoders.waiting >= 3)
            sizes += encoders.get()[0].sizes
            taken += 1
    images = [large[0] if number % 4 == 0 else large[0, :1, : number + 1] for number in range(40)]
    assert sizes == [len(encode(image, "png")) for image in images]


@pytest.mark.parametrize("format", ["jpg", "png", "webp"])
@pytest.mark.parametrize("room", [encoding.MEMBER_BYTES, 0])
def test_parts_of_a_shard_are_those_of_one_writer(format: Format, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "MEMBER_BYTES", room)  # without room the answer comes through the pipe
    with Encoders(2, format, None, images=40, image_bytes=IMAGES[0].nbytes) as encoders:
        encoders.put([IMAGES[:10], IMAGES[10:15]], "shard", 0, 1000)
        encoders.put([IMAGES[15:]], "shard", 15, 1015)
        begin, _ = encoders.get()
        end, _ = encoders.get()
    whole, parts = ShardWriter("shard", format, []), ShardWriter("shard", format, [])
    whole.add_all([encode(image, format) for image in IMAGES], [f"{index:012d}" for index in range(1000, 1040)])
    parts.add_members(begin)
    parts.add_members(end)
    expected, found = whole.finish("x.tar"), parts.finish("x.tar")
    assert b"".join(found[0]) == b"".join(expected[0])
    assert found[1] == expected[1]


def test_a_killed_encoder_is_said_and_none_outlives_the_work() -> None:
    before = set(psutil.Process().children(recursive=True))
    with Encoders(2, "jpg", 90, images=40, image_bytes=IMAGES[0].nbytes) as encoders:
        encode_one(encoders)
        processes = [encoder.process for encoder in encoders._all]
        assert processes[0].pid
        assert processes[1].pid
        os.kill(processes[0].pid, signal.SIGTERM)  # encoders ignore it
        encode_one(encoders)
        encode_one(encoders)
        for process in processes:
            os.kill(int(process.pid or 0), signal.SIGKILL)
        with pytest.raises(TryAgainError, match="fewer --encoders"):
            encode_one(encoders)
    assert not any(process.is_alive() for process in processes)
    left = set(psutil.Process().children(recursive=True)) - before
    assert all("forkserver" in " ".join(p.cmdline()) or "resource_tracker" in " ".join(p.cmdline()) for p in left)


def test_what_goes_wrong_there_is_raised_here() -> None:
    with Encoders(1, "jpg", 90, images=4, image_bytes=12) as encoders:
        encoders.put([np.zeros((1, 2, 3, 2), np.uint8)], "shard", 0, 0)  # two channels
        with pytest.raises((ValueError, TypeError)):
            encoders.get()
        encoders.put([IMAGES[:1, :2, :2]], "shard", 0, 0)
        assert encoders.get()[0].images == 1
