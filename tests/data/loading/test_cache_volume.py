"""A cache never fills the volume that it lies on, and training goes on where it has no room."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from loader_cases import all_images, write_dataset
from storage_servers import FaultyProxy, python_server

from pipeline.common.errors import TryAgainError
from pipeline.common.storage import Store, spare_bytes
from pipeline.data.dataset import open_dataset
from pipeline.data.loading.loader import Loader
from pipeline.data.loading.shard_cache import open_cache
from pipeline.data.loading.shuffle import image_ids

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")

DISK_BYTES = 400 << 10


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[FaultyProxy]:
    """Ten shards of some 75 kB."""
    write_dataset(tmp_path / "root", [6] * 10, side=64)
    with python_server(tmp_path / "root") as port:
        proxy = FaultyProxy(port)
        yield proxy
        proxy.stop()


def test_a_set_larger_than_the_volume_is_read_and_some_of_it_kept(web: FaultyProxy, disk: Path, tmp_path: Path) -> None:
    images = all_images(open_dataset(tmp_path / "root"))
    (disk / "of others").write_bytes(bytes(100 << 10))
    with Loader(
        open_dataset(web.url), cache_dir=disk / "cache", resident_limit=0, seed=4, streams=4, batch=8
    ) as loader:
        for step, batch in enumerate(image_ids(loader.dataset, 4, 4, 0, 240).reshape(30, 8)):
            assert np.array_equal(loader.next_batch(), images[batch])
            assert shutil.disk_usage(disk).free >= DISK_BYTES // 20
            if step == 10:
                kept = len(list((disk / "cache").glob("*.tar")))
    assert 2 <= kept <= 3
    assert (disk / "of others").stat().st_size == 100 << 10


def test_shards_give_way_to_others_files_and_to_newer_shards(web: FaultyProxy, disk: Path) -> None:
    dataset = open_dataset(web.url)
    cache = open_cache(disk)
    assert cache.limit_bytes == spare_bytes(disk)
    for index in range(4):
        cache.open(dataset, dataset.shards[index]).close()
    assert len(list(disk.glob("*.tar"))) == 4
    (disk / "of others").write_bytes(bytes(60 << 10))  # less than a shard of room is left
    cache.open(dataset, dataset.shards[4]).close()
    held = {path.stem for path in disk.glob("*.tar")}
    assert dataset.shards[4].sha256 in held
    assert dataset.shards[0].sha256 not in held
    assert spare_bytes(disk) >= 0
    assert open_cache(disk).limit_bytes < cache.limit_bytes


def test_without_room_a_shard_is_read_and_not_kept(web: FaultyProxy, disk: Path, tmp_path: Path) -> None:
    (disk / "of others").write_bytes(bytes(350 << 10))
    dataset = open_dataset(web.url)
    with open_cache(disk / "cache").open(dataset, dataset.shards[0]) as file:
        assert file.read() == (tmp_path / "root" / dataset.shards[0].name).read_bytes()
    assert not (disk / "cache").exists()


def test_a_tar_of_others_without_room_is_one_line(web: FaultyProxy, disk: Path, tmp_path: Path) -> None:
    """It may be as large as it likes, so memory is no place for it."""
    (disk / "of others").write_bytes(bytes(350 << 10))
    dataset = open_dataset(web.url)
    indexed = dataset.model_copy(update={"encoding": "tar"}).at(Store(web.url))
    with pytest.raises(TryAgainError, match=r"disk: no room for 000000\.tar .* set DCGAN_CACHE"):
        open_cache(disk).open(indexed, dataset.shards[0])
