"""Training from a store must see the images of the local disk, whatever the store does, with a bounded cache."""

import hashlib
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loader_cases import all_images, read_through_cache, write_dataset
from storage_servers import FaultyProxy, python_server

from pipeline.common import storage
from pipeline.common.errors import DataError, TryAgainError
from pipeline.common.storage import Store
from pipeline.data.dataset import open_dataset
from pipeline.data.loading.loader import Loader
from pipeline.data.loading.shard_cache import ShardCache
from pipeline.data.loading.shuffle import image_ids

RUN: dict[str, Any] = {"seed": 4, "streams": 4, "batch": 8}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PAUSES_SECONDS", (0.05, 0.1, 0.2))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[FaultyProxy]:
    root = tmp_path / "root"
    root.mkdir()
    write_dataset(root, [9, 5, 14, 7, 11, 3, 8, 12, 4, 9])
    with python_server(root) as port:
        proxy = FaultyProxy(port)
        yield proxy
        proxy.stop()


def check(url: str, root: Path, cache: Path, batches: int = 40) -> None:
    """Compare a run over the network with the arithmetic on the local files."""
    images = all_images(open_dataset(root))
    with Loader(open_dataset(url), cache_dir=cache, resident_limit=0, **RUN) as loader:
        ids = image_ids(loader.dataset, 4, 4, 0, 8 * batches).reshape(batches, 8)
        for number in range(batches):
            assert np.array_equal(loader.ids(), ids[number])
            assert np.array_equal(loader.next_batch(), images[ids[number]])


def draw(loader: Loader) -> None:
    for _ in range(100):
        loader.next_batch()


def test_a_run_over_http_sees_the_same_images(web: FaultyProxy, tmp_path: Path) -> None:
    check(web.url, tmp_path / "root", tmp_path / "cache")
    shards = [request for request in web.requests if request.endswith(".tar")]
    assert len(shards) == len(set(shards)) == 10, "each shard is downloaded once"
    check(web.url, tmp_path / "root", tmp_path / "cache")
    assert [request for request in web.requests if request.endswith(".tar")] == shards, "and not again"


def test_a_run_outlasts_a_bad_store(web: FaultyProxy, tmp_path: Path) -> None:
    web.faults = [None, 503, "cut", "reset", None, "cut", 500, "cut", None, "reset"]
    check(web.url, tmp_path / "root", tmp_path / "cache")
    assert not web.faults


def test_a_store_that_stays_away_ends_the_run_with_one_line(web: FaultyProxy, tmp_path: Path) -> None:
    loader = Loader(open_dataset(web.url), cache_dir=tmp_path / "cache", resident_limit=0, **RUN)
    web.always = 503
    with loader, pytest.raises(TryAgainError, match=r"\.tar: the store failed"):
        draw(loader)


def test_a_shard_altered_in_the_store_is_refused_after_a_second_download(web: FaultyProxy, tmp_path: Path) -> None:
    path = tmp_path / "root" / "000003.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    with (
        Loader(open_dataset(web.url), cache_dir=tmp_path / "cache", resident_limit=0, **RUN) as loader,
        pytest.raises(DataError, match=hashlib.sha256(content).hexdigest()) as caught,
    ):
        draw(loader)
    assert loader.dataset.shards[3].sha256 in str(caught.value)
    assert web.requests.count("GET /000003.tar") == 2


def test_a_copy_damaged_in_the_cache_is_replaced(web: FaultyProxy, tmp_path: Path) -> None:
    check(web.url, tmp_path / "root", tmp_path / "cache")
    for number, path in enumerate(sorted((tmp_path / "cache").glob("*.tar"))):
        path.write_bytes(path.read_bytes()[: 100 * number] if number % 2 else b"\0" * path.stat().st_size)
    check(web.url, tmp_path / "root", tmp_path / "cache")
    assert len([request for request in web.requests if request.endswith(".tar")]) == 20


def test_the_cache_is_bounded_and_keeps_what_was_read_last(web: FaultyProxy, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "root", [6] * 8).at(Store(web.url))
    size = dataset.shards[0].bytes
    cache = ShardCache(tmp_path / "cache", limit_bytes=4 * size)
    for index in (0, 1, 2, 3, 0, 4, 5):  # 1 and 2 were read longest ago
        with cache.open(dataset, dataset.shards[index]) as file:
            assert hashlib.sha256(file.read()).hexdigest() == dataset.shards[index].sha256
    held = {path.stem for path in (tmp_path / "cache").glob("*.tar")}
    assert held == {dataset.shards[index].sha256 for index in (3, 0, 4, 5)}


def test_a_removed_copy_does_no_harm_to_its_reader(web: FaultyProxy, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "root", [6] * 3).at(Store(web.url))
    cache = ShardCache(tmp_path / "cache", limit_bytes=1)
    with cache.open(dataset, dataset.shards[0]) as first, cache.open(dataset, dataset.shards[1]):
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
        assert hashlib.sha256(first.read()).hexdigest() == dataset.shards[0].sha256


def test_processes_share_the_cache(web: FaultyProxy, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=read_through_cache, args=(web.url, str(tmp_path / "cache"), seed)) for seed in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not [name for name in os.listdir(tmp_path / "cache") if name.endswith(".tmp")]
