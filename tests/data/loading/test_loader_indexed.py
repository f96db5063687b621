"""The tars of others must give the images that a build would store of them, and nothing else when they change."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loader_cases import tar_images, write_tars
from storage_servers import NGINX, FaultyProxy, nginx

from pipeline.common import storage
from pipeline.common.errors import DataError
from pipeline.data.dataset import Dataset
from pipeline.data.index.indexer import make_index
from pipeline.data.loading import tar_files
from pipeline.data.loading.loader import RESIDENT_BYTES, Loader
from pipeline.data.loading.shuffle import image_ids

RUN: dict[str, Any] = {"seed": 4, "streams": 4, "batch": 8}
SIDE = 8


def index(tars: list[str], out: Path, channels: int = 3) -> Dataset:
    dataset = make_index(tars, str(out), size=SIDE, channels=3 if channels == 3 else 1, workers=1)
    assert dataset is not None
    return dataset


def spoil(path: str, dataset: Dataset, shard: int, rows: list[int]) -> None:
    """Overwrite images with zeros; the tar's headers, its size and what the index knows stay as they are."""
    offsets, sizes = dataset.members(shard)
    with open(path, "r+b") as file:
        for row in rows:
            file.seek(int(offsets[row]))
            file.write(bytes(int(sizes[row])))


def draw(loader: Loader, batches: int = 40) -> list[Any]:
    return [loader.next_batch() for _ in range(batches)]


@pytest.mark.parametrize("resident_limit", [0, RESIDENT_BYTES])
@pytest.mark.parametrize(("channels", "mix"), [(3, 1), (3, 3), (1, 2)])
def test_ranks_and_restarts_see_what_a_build_would_store(
    tmp_path: Path, resident_limit: int, channels: int, mix: int
) -> None:
    tars = write_tars(tmp_path / "tars", [9, 5, 14, 7, 11, 3])
    dataset, images = index(tars, tmp_path / "index", channels), tar_images(tars, SIDE, channels)
    assert dataset.images == len(images) == 49
    seen = 0
    for world_size, batches in ((1, 7), (2, 9), (4, 3)):
        ids = image_ids(dataset, 4, 4, seen, 8 * batches, mix=mix).reshape(batches, 8)
        for rank in range(world_size):
            here: dict[str, Any] = {"start": seen, "rank": rank, "world_size": world_size, "mix": mix}
            with Loader(dataset, resident_limit=resident_limit, **here, **RUN) as loader:
                for batch in ids[:, rank::world_size]:
                    assert np.array_equal(loader.next_batch(), images[batch])
        seen += 8 * batches


@pytest.mark.parametrize("resident_limit", [0, RESIDENT_BYTES])
def test_an_image_that_cannot_be_decoded_is_replaced_by_the_next(
    tmp_path: Path, resident_limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    tars = write_tars(tmp_path / "tars", [6, 6])
    dataset, images = index(tars, tmp_path / "index"), tar_images(tars, SIDE)
    spoil(tars[0], dataset, 0, [2, 3, 5])  # two in a row, and the last, which the first stands for
    for broken, stand_in in ((2, 4), (3, 4), (5, 0)):
        images[broken] = images[stand_in]
    with Loader(dataset, resident_limit=resident_limit, **RUN) as loader, caplog.at_level(logging.WARNING):
        for batch in image_ids(dataset, 4, 4, 0, 160).reshape(20, 8):
            assert np.array_equal(loader.next_batch(), images[batch])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3, "each once"
    assert all(any(f"0000{row}." in line and tars[0] in line for line in said) for row in (2, 3, 5))


def test_a_tar_without_a_usable_image_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_files, "REPLACEMENTS", 3)
    tars = write_tars(tmp_path / "tars", [9])
    dataset = index(tars, tmp_path / "index")
    spoil(tars[0], dataset, 0, [2, 3, 4, 5])
    with (
        Loader(dataset, resident_limit=0, **RUN) as loader,
        pytest.raises(DataError, match=r"train-0000\.tar: 4 images in a row cannot be decoded.*00005"),
    ):
        draw(loader)


@pytest.mark.parametrize("change", ["longer", "another key", "missing"])
def test_a_tar_that_changed_is_refused_by_name(tmp_path: Path, change: str) -> None:
    tars = write_tars(tmp_path / "tars", [9, 9])
    dataset = index(tars, tmp_path / "index")
    path = Path(tars[1])
    content = path.read_bytes()
    path.unlink()
    if change == "longer":
        path.write_bytes(content + bytes(512))
    elif change == "another key":
        other = write_tars(tmp_path / "other", [8, 10])[1]
        path.write_bytes(Path(other).read_bytes()[: len(content)].ljust(len(content), b"\0"))
    with Loader(dataset, resident_limit=0, **RUN) as loader, pytest.raises(DataError, match=r"train-0001\.tar"):
        draw(loader)


def test_a_tar_that_is_cut_while_it_is_read_is_refused_and_not_mended(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars", [30])
    dataset = index(tars, tmp_path / "index")
    with Loader(dataset, resident_limit=0, **RUN) as loader:
        loader.next_batch()
        os.truncate(tars[0], 0)
        with pytest.raises(DataError, match=r"train-0000\.tar: changed while it was read"):
            draw(loader)


def test_only_so_many_tars_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.loading.tar_buffer.MOST_OPEN", 2)
    tars = write_tars(tmp_path / "tars", [5] * 8)
    dataset, images = index(tars, tmp_path / "index"), tar_images(tars, SIDE)
    with Loader(dataset, resident_limit=0, mix=2, **RUN) as loader:
        for batch in image_ids(dataset, 4, 4, 0, 80, mix=2).reshape(10, 8):
            assert np.array_equal(loader.next_batch(), images[batch])
        held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
    assert sum(name in tars for name in held) <= 2


def _is_open(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


@pytest.mark.skipif(not NGINX, reason="nginx is not installed; `make system` installs it")
def test_a_run_over_http_sees_the_same_and_refuses_a_tar_with_another_etag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PAUSES_SECONDS", (0.05,))
    tars = write_tars(tmp_path / "tars", [9, 5, 14, 7])
    images = tar_images(tars, SIDE)
    with nginx(tmp_path / "tars", tmp_path / "nginx") as port:
        web = FaultyProxy(port)
        dataset = index([f"{web.url}/{Path(tar).name}" for tar in tars], tmp_path / "index")
        web.requests.clear()
        settings: dict[str, Any] = {"cache_dir": tmp_path / "cache", "resident_limit": 0, **RUN}
        for _ in range(2):  # the second time from the cache
            with Loader(dataset, **settings) as loader:
                for batch in image_ids(dataset, 4, 4, 0, 80).reshape(10, 8):
                    assert np.array_equal(loader.next_batch(), images[batch])
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 4
        changed = Path(tars[2])
        spoil(tars[2], dataset, 2, [0])  # the same headers
        os.utime(changed, (1, 1))
        with Loader(dataset, **settings) as loader, pytest.raises(DataError, match=rf"{web.url}/train-0002\.tar.*ETag"):
            draw(loader)
        web.stop()
    shutil.rmtree(tmp_path / "cache")
