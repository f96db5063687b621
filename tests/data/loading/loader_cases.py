"""Small data sets for the loader's tests, written by the real writer."""

import hashlib
import shutil
import tarfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import webdataset as wds
from numpy.typing import NDArray
from picture_files import make_picture

from pipeline.common.errors import TryAgainError
from pipeline.common.imaging import encode
from pipeline.common.storage import Store
from pipeline.data.build.transform import Recipe
from pipeline.data.dataset import DATASET_FILE, Dataset, Encoding, open_dataset
from pipeline.data.loading.shard_cache import ShardCache
from pipeline.data.shard_reader import iterate
from pipeline.data.shard_writer import ShardWriter


def write_dataset(
    folder: Path, sizes: Sequence[int], encoding: Encoding = "packed", *, side: int = 4, channels: int = 3
) -> Dataset:
    """Write shards of `sizes` random images each, and dataset.json."""
    folder.mkdir(exist_ok=True)
    rng, shards = np.random.default_rng(sum(sizes)), []
    for number, size in enumerate(sizes):
        writer = ShardWriter(f"{number:06d}", encoding, [])
        for index in range(size):
            image = rng.integers(0, 256, (side, side, channels), dtype=np.uint8)
            assert writer.add(image if encoding == "packed" else encode(image, encoding), f"{number}-{index}", [])
        data, shard = writer.finish(f"{number:06d}.tar")
        (folder / shard.name).write_bytes(b"".join(data))
        shards.append(shard)
    dataset = Dataset(
        image_size=side,
        channels=3 if channels == 3 else 1,
        encoding=encoding,
        source={"kind": "test"},
        images=sum(sizes),
        bytes=sum(shard.bytes for shard in shards),
        shards=shards,
    )
    (folder / DATASET_FILE).write_text(dataset.model_dump_json())
    return dataset.at(Store(folder))


def write_tars(folder: Path, sizes: Sequence[int]) -> list[str]:
    """Write tars of others: pictures of every size and format, with labels beside them, in the order of their class."""
    folder.mkdir(exist_ok=True)
    paths, number = [], 0
    for tar, size in enumerate(sizes):
        paths.append(str(folder / f"train-{tar:04d}.tar"))
        with open(paths[-1], "wb") as file, wds.TarWriter(file) as writer:
            for _ in range(size):
                picture = make_picture(number, 20 + number % 37, 16 + number % 29)
                form = ("jpg", "png", "jpg", "webp", "jpg")[number % 5]
                writer.write({"__key__": f"{number:05d}", form: encode(picture, form), "cls": str(tar)})  # type: ignore[arg-type]
                number += 1
    return paths


def tar_images(tars: Sequence[str], size: int, channels: int = 3) -> NDArray[np.uint8]:
    """Return the images that a build would store of the tars, in their order."""
    recipe = Recipe(size=size, channels=3 if channels == 3 else 1, encoding="packed", quality=100, min_side=1)
    images = []
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                if not member.name.endswith(".cls"):
                    images.append(recipe.convert(tar.extractfile(member).read()))  # type: ignore[union-attr]
    return np.stack(images)


def all_images(dataset: Dataset) -> NDArray[np.uint8]:
    """Return the images in the data set's own order, read by `iterate`, which shares no code with the loader."""
    return np.concatenate(list(iterate(dataset)))


def read_through_cache(url: str, cache: str, seed: int) -> None:
    """Read shards at random through a cache that holds three of them; for processes that share one."""
    dataset = open_dataset(url)
    bounded = ShardCache(Path(cache), limit_bytes=3 * max(shard.bytes for shard in dataset.shards))
    for index in np.random.default_rng(seed).integers(0, len(dataset.shards), 60).tolist():
        with bounded.open(dataset, dataset.shards[index]) as file:
            assert hashlib.sha256(file.read()).hexdigest() == dataset.shards[index].sha256


class WatchedStore(Store):
    """A remote store with the files of a folder: notes what is asked for, and answers while its gate is open."""

    def __init__(self, folder: Path) -> None:
        super().__init__("memory://watched")
        self.folder = folder
        self.gate = threading.Event()
        self.gate.set()
        self.broken: set[str] = set()
        self.fetched: list[str] = []
        self.running = self.most = 0
        self._changed = threading.Condition()

    def fetch(self, name: str, path: Path) -> None:
        """Copy `name` to `path`. Raises TryAgainError while `name` is broken."""
        with self._changed:
            self.fetched.append(name)
            self.running += 1
            self.most = max(self.most, self.running)
            self._changed.notify_all()
        try:
            assert self.gate.wait(200)
            if name in self.broken:
                raise TryAgainError(f"{name}: the store failed")
            shutil.copyfile(self.folder / name, path)
        finally:
            with self._changed:
                self.running -= 1

    def wait_for(self, requests: int) -> None:
        """Return when that many requests wait for an answer."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.running >= requests, 30), f"only {self.running} requests"
