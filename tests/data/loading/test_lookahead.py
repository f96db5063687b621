"""What is read ahead must keep to its budget, hide a slow store, and change no image; nothing may be read in vain."""

import os
import threading
import time
from collections import Counter
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loader_cases import WatchedStore, all_images, write_dataset

from pipeline.common.errors import TryAgainError
from pipeline.config import load_config
from pipeline.data.dataset import Dataset
from pipeline.data.loading.loader import Loader, lookahead_bytes
from pipeline.data.loading.lookahead import MOST_AHEAD, Lookahead, slots_for
from pipeline.data.loading.shard_cache import ShardCache
from pipeline.data.loading.shuffle import Shuffle, image_ids

RUN: dict[str, Any] = {"seed": 4, "streams": 2, "batch": 4, "resident_limit": 0}
SHARDS, SHARD_IMAGES = 24, 4
SHARD_BYTES = SHARD_IMAGES * 48
EPOCH = SHARDS * SHARD_IMAGES


@pytest.fixture
def local(tmp_path: Path) -> Dataset:
    return write_dataset(tmp_path / "root", [SHARD_IMAGES] * SHARDS)


@pytest.fixture
def store(local: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WatchedStore:
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path / "cache"))
    return WatchedStore(tmp_path / "root")


def cached(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.tar")}


@pytest.mark.parametrize("ahead", [1, 6, 9])
def test_as_many_shards_are_on_their_way_as_the_budget_holds_and_no_more(
    local: Dataset, store: WatchedStore, ahead: int
) -> None:
    images = all_images(local)
    store.gate.clear()
    with Loader(local.at(store), lookahead_bytes=(ahead + 1) * SHARD_BYTES - 1, **RUN) as loader:
        store.wait_for(2 + ahead)
        on_their_way = (2 + ahead) * local.shards[0].bytes
        assert loader.resident_bytes == (2 + ahead) * SHARD_BYTES + on_their_way + 5 * 4 * 48
        store.gate.set()
        for ids in image_ids(local, 4, 2, 0, 2 * EPOCH).reshape(-1, 4):
            assert np.array_equal(loader.next_batch(), images[ids])
            assert loader.prefetched_images <= (2 + ahead) * SHARD_IMAGES + 4 * 4
    assert store.most == 2 + ahead


def test_nothing_is_read_beyond_the_end_of_the_run(local: Dataset, store: WatchedStore) -> None:
    seen = image_ids(local, 4, 2, 8, 16)
    with Loader(local.at(store), start=8, end=24, lookahead_bytes=1 << 20, **RUN) as loader:
        assert np.concatenate([loader.next_batch() for _ in range(4)]).shape == (16, 4, 4, 3)
        with pytest.raises(RuntimeError, match="ends at image 24"):
            loader.next_batch()
    needed = {local.shards[index // SHARD_IMAGES].name for index in seen.tolist()}
    assert Counter(store.fetched) == dict.fromkeys(needed, 1)
    assert len(needed) < SHARDS / 2


@pytest.mark.parametrize("recovers", [True, False])
def test_a_shard_that_fails_ahead_of_time_stops_the_run_only_where_it_is_needed(
    local: Dataset, store: WatchedStore, recovers: bool
) -> None:
    """And by then the store may have recovered."""
    images, ids = all_images(local), image_ids(local, 4, 2, 0, EPOCH).reshape(-1, 4)
    shards = [(batch // SHARD_IMAGES).tolist() for batch in ids]
    late = shards[12][0]
    first = next(number for number, batch in enumerate(shards) if late in batch)
    store.broken = {local.shards[late].name}
    with Loader(local.at(store), lookahead_bytes=1 << 20, **RUN) as loader:
        for _ in range(2):
            loader.next_batch()
        wait([loader._buffer._loads[late]], 200)
        store.broken = set() if recovers else store.broken
        for batch in ids[2:first]:
            assert np.array_equal(loader.next_batch(), images[batch])
        if recovers:
            assert np.array_equal(loader.next_batch(), images[ids[first]])
        else:
            with pytest.raises(TryAgainError, match=local.shards[late].name):
                loader.next_batch()
    assert store.fetched.count(local.shards[late].name) == 2


def test_closing_while_shards_are_on_their_way_leaves_no_threads(local: Dataset, store: WatchedStore) -> None:
    before = set(threading.enumerate())
    store.gate.clear()
    loader = Loader(local.at(store), lookahead_bytes=1 << 20, **RUN)
    store.wait_for(16)
    closing = threading.Thread(target=loader.close)
    closing.start()
    while not loader._buffer._threads._closed:
        time.sleep(0.001)
    store.gate.set()
    closing.join(200)
    assert set(threading.enumerate()) <= before
    assert len(store.fetched) < SHARDS, "what had not begun never began"


def test_the_budget_is_that_of_a_machine(local: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shares = load_config(overrides=["runtime.lookahead_mb=1"]), []
    for processes in ("", "1", "2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        shares.append(lookahead_bytes(config))
    assert shares == [1 << 20, 1 << 20, 1 << 19]
    assert slots_for(local, streams=2, mix=1, lookahead_bytes=0) == 2 + 1
    assert slots_for(local, streams=2, mix=3, lookahead_bytes=2 * SHARD_BYTES) == 6 + 3
    assert slots_for(local, streams=2, mix=1, lookahead_bytes=8 * SHARD_BYTES - 1) == 2 + 7
    assert slots_for(local, streams=2, mix=1, lookahead_bytes=1 << 30) == 2 + MOST_AHEAD


def test_what_the_run_cannot_need_again_is_not_cached(local: Dataset, store: WatchedStore, tmp_path: Path) -> None:
    with Loader(local.at(store), end=EPOCH, lookahead_bytes=4 * SHARD_BYTES, **RUN) as loader:
        for _ in range(EPOCH // 4):
            loader.next_batch()
    assert list((tmp_path / "cache").glob("*")) == []
    store.fetched.clear()
    with Loader(local.at(store), end=2 * EPOCH, lookahead_bytes=4 * SHARD_BYTES, **RUN) as loader:
        for _ in range(2 * EPOCH // 4):
            loader.next_batch()
    assert len(cached(tmp_path / "cache")) == SHARDS
    assert sorted(store.fetched) == [shard.name for shard in local.shards], "each once, in two epochs"


def test_of_a_set_larger_than_the_cache_a_part_stays_in_it(
    local: Dataset, store: WatchedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If each new shard took the place of an old one, a cache of nearly the whole set would be of little use."""
    stays = SHARDS * 3 // 4
    monkeypatch.setenv("DCGAN_CACHE_GIB", repr((stays + 0.5) * local.shards[0].bytes / (1 << 30)))
    with Loader(local.at(store), **RUN) as loader:
        for _ in range(3 * EPOCH // 4):
            loader.next_batch()
    assert cached(tmp_path / "cache") == {shard.sha256 for shard in local.shards[:stays]}
    counts = Counter(store.fetched)
    assert all(counts[shard.name] == 1 for shard in local.shards[:stays])
    assert all(counts[shard.name] >= 2 for shard in local.shards[stays:])


def test_only_what_no_checksum_covers_is_synced(
    local: Dataset, store: WatchedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    synced: list[object] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    dataset = local.at(store)
    cache.open(dataset, dataset.shards[0]).close()
    assert not synced
    others = dataset.model_copy(update={"encoding": "tar"}).at(store)
    cache.open(others, others.shards[1]).close()
    assert synced


def test_the_cache_is_not_listed_for_every_download(
    local: Dataset, store: WatchedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, listed = ShardCache(tmp_path / "cache", 1 << 30), []

    def list_it(*, keep: Path) -> None:
        listed.append(keep)

    monkeypatch.setattr(cache, "_evict", list_it)
    for shard in local.shards:
        cache.open(local.at(store), shard).close()
    assert len(listed) == 1


def test_the_last_epoch_is_the_one_that_does_not_come_back() -> None:
    order = Shuffle([10] * 4, seed=0, streams=4)  # an epoch has ten offsets
    assert [order.comes_back(offset, 25) for offset in (0, 9, 10, 19, 20)] == [True, True, True, True, False]


def test_the_shards_that_follow_are_the_next_ones_in_order() -> None:
    order = Shuffle([10] * 12, seed=0, streams=2)
    coming = sorted(visit for stream in range(2) for visit, _ in zip(order.visits(stream, 0), range(6), strict=False))
    in_turn = list(dict.fromkeys(shard for visit in coming for shard in visit.shards))
    assert len(in_turn) == 12
    for limit in range(2, 12):
        assert Lookahead(order, range(2), 0).wanted(in_turn[:2], 0, limit) == in_turn[:limit]
    ahead = Lookahead(order, range(2), 0)
    assert ahead.wanted(in_turn[:2], 0, 5) == in_turn[:5]
    assert ahead.wanted(in_turn[:2], 9, 5) is None, "no stream has entered another shard"
    assert ahead.wanted(in_turn[2:4], 10, 5) == in_turn[2:7]
    assert ahead.entered == set(in_turn[2:4])
