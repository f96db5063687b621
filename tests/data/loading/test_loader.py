"""Every process count, batch and restart must give the same images; damage must stop a run before it is learned."""

import gc
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loader_cases import all_images, write_dataset

from pipeline.common.errors import ConfigConflict, DataError
from pipeline.data.dataset import Encoding, open_dataset
from pipeline.data.loading.loader import RESIDENT_BYTES, Loader
from pipeline.data.loading.lookahead import ENDLESS
from pipeline.data.loading.shuffle import image_ids


@st.composite
def runs(draw: st.DrawFn) -> dict[str, object]:
    """A data set, a run over it, and the same run resumed on other processes in other batches."""
    sizes = draw(st.lists(st.integers(1, 24), min_size=1, max_size=7))
    streams = draw(st.integers(1, min(12, sum(sizes))))
    divisors = [count for count in range(1, streams + 1) if streams % count == 0]
    legs = st.fixed_dictionaries(
        {
            "world_size": st.sampled_from(divisors),
            "batch": st.integers(1, 5).map(lambda k: k * streams),
            "batches": st.integers(1, 5),
            "resident_limit": st.sampled_from([0, RESIDENT_BYTES]),
            "threads": st.integers(1, 3),
            "lookahead_bytes": st.sampled_from([0, 700, 1 << 20]),
            "ends": st.booleans(),
        }
    )
    return {
        "sizes": sizes,
        "encoding": draw(st.sampled_from(["packed", "packed", "jpg", "webp", "png"])),
        "channels": draw(st.sampled_from([1, 3])),
        "streams": streams,
        "seed": draw(st.integers(0, 2**64 - 1)),
        "start": draw(st.integers(0, 100)) * streams,
        "mix": draw(st.integers(1, 3)),
        "legs": draw(st.lists(legs, min_size=2, max_size=3)),
    }


@pytest.mark.timeout(240)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(runs())
def test_any_processes_batches_and_restarts_see_the_images_of_one_process(run: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder), run["sizes"], run["encoding"], channels=run["channels"])
        images = all_images(dataset)
        seen = run["start"]
        for leg in run["legs"]:
            world_size, batch, batches = leg["world_size"], leg["batch"], leg["batches"]
            ids = image_ids(dataset, run["seed"], run["streams"], seen, batches * batch, mix=run["mix"])
            expected = ids.reshape(batches, batch)
            for rank in range(world_size):
                with Loader(
                    dataset,
                    seed=run["seed"],
                    streams=run["streams"],
                    batch=batch,
                    start=seen,
                    rank=rank,
                    world_size=world_size,
                    threads=leg["threads"],
                    resident_limit=leg["resident_limit"],
                    mix=run["mix"],
                    lookahead_bytes=leg["lookahead_bytes"],
                    end=seen + batches * batch if leg["ends"] else ENDLESS,
                ) as loader:
                    for ids in expected[:, rank::world_size]:
                        assert np.array_equal(loader.ids(), ids)
                        assert np.array_equal(loader.next_batch(), images[ids])
                    assert loader.position == seen + batches * batch
            seen += batches * batch


def test_batches_are_the_callers_to_keep(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [20, 20, 20])
    with Loader(dataset, seed=0, streams=4, batch=8, resident_limit=0) as loader:
        batches = [loader.next_batch() for _ in range(30)]
        copies = [batch.copy() for batch in batches]
        for _ in range(30):
            loader.next_batch()
    assert all(np.array_equal(batch, copy) for batch, copy in zip(batches, copies, strict=True))


def draw_until_shard(loader: Loader, first_id: int) -> None:
    """Draw up to 70 batches, none of which may hold the image `first_id` or a later one."""
    for _ in range(70):
        ids = loader.ids()
        loader.next_batch()
        assert ids.max() < first_id, "an image of a damaged shard was handed out"


@pytest.mark.parametrize("encoding", ["packed", "png"])
@pytest.mark.parametrize("limit", [0, RESIDENT_BYTES])
def test_an_altered_shard_is_refused_with_both_hashes(tmp_path: Path, encoding: Encoding, limit: int) -> None:
    dataset = write_dataset(tmp_path, [16, 16], encoding)
    path = tmp_path / dataset.shards[1].name
    content = bytearray(path.read_bytes())
    content[dataset.shards[1].offsets[0]] ^= 1
    path.write_bytes(content)
    with Loader(dataset, seed=0, streams=2, batch=2, resident_limit=limit) as loader:
        with pytest.raises(DataError) as caught:
            draw_until_shard(loader, 16)
        assert path.name in str(caught.value)
        assert dataset.shards[1].sha256 in str(caught.value)
        assert str(caught.value).count("sha256") == 2
        with pytest.raises(DataError, match=path.name):  # and it stays an error
            loader.next_batch()


@pytest.mark.parametrize("keep", [0, 1, 600, -1])
def test_a_shard_cut_short_is_refused(tmp_path: Path, keep: int) -> None:
    dataset = write_dataset(tmp_path, [16])
    path = tmp_path / dataset.shards[0].name
    path.write_bytes(path.read_bytes()[:keep])
    with (
        Loader(dataset, seed=0, streams=2, batch=2) as loader,
        pytest.raises(DataError, match=f"{path.name}.*{path.stat().st_size} bytes.*{dataset.shards[0].bytes} bytes"),
    ):
        loader.next_batch()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [16])
    (tmp_path / dataset.shards[0].name).unlink()
    with (
        Loader(dataset, seed=0, streams=2, batch=2) as loader,
        pytest.raises(DataError, match=r"000000\.tar.*missing"),
    ):
        loader.next_batch()


def test_a_shard_that_changes_during_the_run_is_read_anew_and_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [8] * 8)
    with Loader(dataset, seed=0, streams=1, batch=1, resident_limit=0) as loader:
        for _ in range(64):  # every shard was verified once
            loader.next_batch()
        for path in tmp_path.glob("*.tar"):
            content = bytearray(path.read_bytes())
            content[700] ^= 255
            path.write_bytes(content)
        with pytest.raises(DataError, match="sha256"):
            draw_until_shard(loader, 64)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [6], "jpg")
    shard = dataset.shards[0]
    path = tmp_path / shard.name
    content = bytearray(path.read_bytes())
    content[shard.offsets[4] : shard.offsets[4] + shard.sizes[4]] = bytes(shard.sizes[4])
    path.write_bytes(content)
    import hashlib

    honest = shard.model_copy(update={"sha256": hashlib.sha256(content).hexdigest()})
    dataset = dataset.model_copy(update={"shards": [honest]})
    for limit in (0, RESIDENT_BYTES):
        with (
            Loader(dataset, seed=0, streams=1, batch=6, resident_limit=limit) as loader,
            pytest.raises(DataError, match=rf"000000\.tar.*offset {shard.offsets[4]}"),
        ):
            loader.next_batch()


def test_offsets_that_lie_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [6, 6], "jpg")
    shard = dataset.shards[1]
    for offsets in ([-5, *shard.offsets[1:]], [*shard.offsets[:-1], shard.bytes], shard.offsets[::-1]):
        lying = dataset.model_copy(
            update={"shards": [dataset.shards[0], shard.model_copy(update={"offsets": offsets})]}
        )
        with pytest.raises(DataError, match=shard.name):
            Loader(lying, seed=0, streams=1, batch=1)


def test_what_cannot_be_divided_is_refused_before_the_first_step(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [20])
    for wrong in ({"batch": 15}, {"world_size": 3}, {"streams": 32, "batch": 32}):
        settings: dict[str, Any] = {"seed": 0, "streams": 8, "batch": 16, **wrong}
        with pytest.raises(ConfigConflict):
            Loader(dataset, **settings)


def test_memory_is_one_shard_a_stream_and_one_ahead(tmp_path: Path) -> None:
    """In a process of its own, whose peak is read from the kernel; the data set is ten times the bound."""
    write_dataset(tmp_path, [85] * 100, side=64)  # 100 shards of 1 MB
    script = f"""
        import resource, torch
        from pipeline.data.dataset import Encoding, open_dataset
        from pipeline.data.loading.loader import Loader
        with Loader(open_dataset({str(tmp_path / "warm")!r}), seed=0, streams=8, batch=16) as loader:
            loader.next_batch()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with Loader(open_dataset({str(tmp_path)!r}), seed=0, streams=8, batch=16, resident_limit=0) as loader:
            for _ in range(85 * 100 // 16):
                loader.next_batch()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(loader.resident_bytes, grown * 1024)
    """
    write_dataset(tmp_path / "warm", [100])
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True, text=True
    ).stdout
    promised, grown = map(int, output.split())
    largest = max(shard.images for shard in open_dataset(tmp_path).shards) * 64 * 64 * 3
    assert promised == 9 * largest + 5 * 16 * 64 * 64 * 3
    assert grown < promised + (6 << 20)


@pytest.mark.parametrize("encoding", ["packed", "jpg", "png"])
@pytest.mark.parametrize("resident_limit", [0, RESIDENT_BYTES])
@pytest.mark.parametrize("shards", [[20, 20], [8] * 12])
def test_batches_of_the_past_are_forgotten(
    tmp_path: Path, encoding: Encoding, resident_limit: int, shards: list[int]
) -> None:
    """Where no slot is ever overwritten, nothing may wait for those who have read it."""
    dataset = write_dataset(tmp_path, shards, encoding)
    with Loader(dataset, seed=0, streams=4, batch=8, threads=1, resident_limit=resident_limit) as loader:
        for _ in range(400):
            loader.next_batch()
        assert sum(type(thing) is Future for thing in gc.get_objects()) < 100


@pytest.mark.parametrize("resident_limit", [0, RESIDENT_BYTES])
def test_shards_are_loaded_side_by_side_and_may_arrive_in_any_order(tmp_path: Path, resident_limit: int) -> None:
    """All at once. Each shard is a pipe here, whose reader hangs until it is written, as with a slow store."""
    dataset = write_dataset(tmp_path, [6] * 8)
    images = all_images(dataset)
    content = {shard.name: (tmp_path / shard.name).read_bytes() for shard in dataset.shards}
    for name in content:
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
    with Loader(dataset, seed=0, streams=4, batch=8, resident_limit=resident_limit) as loader:
        waiting: dict[str, int] = {}
        until = time.monotonic() + 200
        while len(waiting) < loader._buffer.slots:
            assert time.monotonic() < until, f"only {len(waiting)} shards are being read"
            for name in content.keys() - waiting.keys():
                with suppress(OSError):  # nobody reads it
                    waiting[name] = os.open(tmp_path / name, os.O_WRONLY | os.O_NONBLOCK)
        for name, data in content.items():  # from here on it is a file
            (tmp_path / f"{name}.new").write_bytes(data)
            (tmp_path / f"{name}.new").replace(tmp_path / name)
        for name, handle in reversed(waiting.items()):
            os.write(handle, content[name])
            os.close(handle)
        for _ in range(24):
            ids = loader.ids()
            assert np.array_equal(loader.next_batch(), images[ids])


def test_close_ends_the_threads_and_a_waiting_caller(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [30])
    before = threading.active_count()
    loader = Loader(dataset, seed=0, streams=2, batch=4)
    loader.next_batch()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.next_batch()
    for thread in threading.enumerate():
        if thread.name.startswith(("loader", "shard-loader", "decoder")):
            thread.join(10)
    assert threading.active_count() <= before


def test_close_does_not_wait_for_a_disk_that_hangs(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [30])
    path = tmp_path / dataset.shards[0].name
    path.unlink()
    os.mkfifo(path)  # opening it blocks until someone writes
    loader = Loader(dataset, seed=0, streams=2, batch=4)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            loader.next_batch()
        except RuntimeError as error:
            caught.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    loader.close()
    waiting.join(200)
    assert not waiting.is_alive()
    assert caught
    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))  # lets the reader end


def test_the_time_spent_waiting_is_counted(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [30])
    path = tmp_path / dataset.shards[0].name
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    with Loader(dataset, seed=0, streams=2, batch=4) as loader:
        threading.Timer(2, path.write_bytes, [content]).start()
        loader.next_batch()
        assert 0.1 < loader.wait_seconds < 200
