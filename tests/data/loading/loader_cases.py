"""Small data sets for the loader's tests, written by the real writer."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.common.imaging import encode
from pipeline.common.storage import Store
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


def all_images(dataset: Dataset) -> NDArray[np.uint8]:
    """Return the images in the data set's own order, read by `iterate`, which shares no code with the loader."""
    return np.concatenate(list(iterate(dataset)))


def read_through_cache(url: str, cache: str, seed: int) -> None:
    """Read shards at random through a cache that holds three of them; for processes that share one."""
    dataset = open_dataset(url)
    bounded = ShardCache(Path(cache), limit_bytes=3 * max(shard.bytes for shard in dataset.shards))
    for index in np.random.default_rng(seed).integers(0, len(dataset.shards), 60).tolist():
        with bounded.open(dataset.store, dataset.shards[index]) as file:
            assert hashlib.sha256(file.read()).hexdigest() == dataset.shards[index].sha256
