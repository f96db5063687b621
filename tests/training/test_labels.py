"""Conditional training: real images keep their labels, and the run resumes, on any number of processes."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import TINY, Trainer, kill_after_its_first_checkpoint
from training_cases import SCHEDULE, hashes

from pipeline.checkpoints.reference import load_generator
from pipeline.common.errors import ConfigConflict, UsageError
from pipeline.common.imaging import encode
from pipeline.common.storage import Store
from pipeline.config import load_config
from pipeline.data.dataset import DATASET_FILE, Dataset, Encoding, dump_dataset, open_dataset
from pipeline.data.loading.device_set import DeviceLoader, load_images
from pipeline.data.loading.loader import run_loader
from pipeline.data.shard_writer import ShardWriter, write_shard
from pipeline.evaluation import inputs
from pipeline.training.loop import train
from pipeline.training.update.labels import Labels, label_blocks, with_classes

SETTINGS = [*TINY, "network.channels=1", "schedule.log_every_images=32", "schedule.evaluate_samples=64"]


def labeled_dataset(folder: Path, encoding: Encoding = "packed", images: int = 150) -> Path:
    """Write gray images whose brightness tells their labels: `kind` 0 to 4, and two booleans."""
    rng, store, shards = np.random.default_rng(0), Store(folder), []
    kinds = rng.integers(0, 5, images)
    for start in range(0, images, 40):
        writer = ShardWriter(f"{start:06d}", encoding, ["kind", "high", "odd"])
        for image in range(start, min(start + 40, images)):
            kind = int(kinds[image])
            pixels = np.full((32, 32, 1), 50 * kind, np.uint8)
            pixels[0] = image
            data = pixels if encoding == "packed" else encode(pixels, encoding)
            writer.add(data, f"image{image:05d}", [kind, kind > 2, kind % 2 == 1])
        shards.append(write_shard(store, f"shard-{start:06d}.tar", writer))
    types: Any = {"kind": "int", "high": "bool", "odd": "bool"}
    sizes: Any = {"images": images, "bytes": sum(shard.bytes for shard in shards), "shards": shards}
    dataset = Dataset(image_size=32, channels=1, encoding=encoding, labels=types, source={}, **sizes)
    store.write(DATASET_FILE, dump_dataset(dataset))
    return folder


def batches_of(*arguments: Any, **place: Any) -> Iterator[Labels | None]:
    return chain.from_iterable(label_blocks(*arguments, **place))


def kinds_of(images: Any) -> list[int]:
    """Return the class that each image's brightness tells."""
    return [int(image[16, 16, 0]) // 50 for image in np.asarray(images)]


@pytest.mark.parametrize("encoding", ["packed", "png"])
def test_the_labels_of_a_batch_are_those_of_its_images_wherever_they_are(tmp_path: Path, encoding: Encoding) -> None:
    dataset = open_dataset(labeled_dataset(tmp_path / "data", encoding))
    config, classes = with_classes(load_config(overrides=[*SETTINGS, "label=kind"]), dataset)
    assert config.network.classes == ("0", "1", "2", "3", "4")
    assert sum(config.network.class_images) == dataset.images
    recipe = config.recipe
    place: Any = {"seed": recipe.seed, "streams": recipe.streams, "batch": recipe.batch}
    for start, rank, world_size in ((0, 0, 1), (160, 1, 2)):  # the second from a position in the second epoch
        labels = batches_of(config, dataset, classes, start=start, rank=rank, world_size=world_size)
        resident = load_images(dataset, torch.device("cpu"))
        with (
            run_loader(config, dataset, start=start, rank=rank, world_size=world_size) as streamed,
            DeviceLoader(dataset, resident, start=start, rank=rank, world_size=world_size, **place) as device,
        ):
            for _ in range(12):
                batch = next(labels)
                assert batch is not None
                real, fake = batch
                images = streamed.next_batch()
                assert np.array_equal(images, device.next_batch().numpy())
                assert real.argmax(1).tolist() == kinds_of(images)
                assert (real.sum(1) == 1).all()
                assert real.shape == fake.shape == (16 // world_size, 5)
                assert not np.array_equal(real, fake)


def test_two_ranks_have_the_labels_of_one(tmp_path: Path) -> None:
    dataset = open_dataset(labeled_dataset(tmp_path / "data"))
    config, classes = with_classes(load_config(overrides=[*SETTINGS, "label=high,odd"]), dataset)
    whole = batches_of(config, dataset, classes, start=48)
    ranks = [batches_of(config, dataset, classes, start=48, rank=rank, world_size=2) for rank in (0, 1)]
    for _ in range(3):
        one, (first, second) = next(whole), [next(rank) for rank in ranks]
        for both, even, odd in zip(one or (), first or (), second or (), strict=True):
            assert np.array_equal(both[0::2], even)
            assert np.array_equal(both[1::2], odd)


def weights(run: Path, images: int) -> dict[str, str]:
    """Return the SHA-256 of the weights and moments of a checkpoint."""
    files = json.loads((run / "checkpoints" / f"{images:012d}" / "state.json").read_text())["files"]
    return {name: sha256 for name, sha256 in files.items() if name != "metrics.jsonl"}


@pytest.mark.parametrize("kind", ["projection", "concat"])
def test_a_conditional_run_resumes_to_the_same_bits_and_refuses_other_labels(
    tmp_path: Path, one_thread: None, kind: str
) -> None:
    data, out = labeled_dataset(tmp_path / "data"), tmp_path / "run"

    def run(out: Path, images: int, *overrides: str) -> None:
        settings = [*SETTINGS, f"conditioning={kind}", "label=high,odd", f"total_images={images}", *overrides]
        train(load_config(overrides=settings), data=str(data), out=out)

    run(tmp_path / "whole", 128)
    run(out, 64)
    run(out, 128, "runtime.data=device")
    assert weights(out, 128) == weights(tmp_path / "whole", 128)
    grid = Image.open(out / "samples" / f"{128:09d}.png")
    assert grid.size[0] > 8 * 32
    assert grid.size[1] > 4 * 32, "a row for each combination"
    loaded = load_generator(str(out))
    assert loaded.config.class_titles == ("none", "odd", "high", "high+odd")
    with pytest.raises(ConfigConflict, match=r"network\.label .*'high', 'odd'.* -> .*'odd', 'high'"):
        run(out, 160, "label=odd,high")
    with pytest.raises(ConfigConflict, match=r"network\.classes .*'00', '01'"):
        run(out, 160, "classes=['11','00','10','01']")
    with pytest.raises(ConfigConflict, match=r"of kind are others: the data has '1'"):
        run(tmp_path / "new", 160, "label=kind", "classes=['0','7']")
    with pytest.raises(UsageError, match=r"network\.label hat: .*such label; it has: kind, high, odd") as refused:
        run(tmp_path / "new", 160, "label=hat")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "new").exists()
    fakes, _ = inputs.fakes(str(out), None, 4, 0)
    assert next(iter(fakes.blocks()))[1].shape == (4, 32, 32, 1)
    with pytest.raises(UsageError, match="is conditioned on high, odd"):
        inputs.generator(str(out))


@pytest.mark.parametrize("kind", ["projection", pytest.param("concat", marks=pytest.mark.slow)])
def test_a_conditional_run_that_is_killed_ends_with_the_bits_of_one_that_was_not(
    tmp_path: Path, trainer: Trainer, kind: str
) -> None:
    """Killed wherever it is after its first checkpoint, and compared where it then is."""
    data, out = labeled_dataset(tmp_path / "data"), tmp_path / "run"
    settings = [*SCHEDULE, "network.channels=1", "label=kind", f"conditioning={kind}"]
    total = 96 + kill_after_its_first_checkpoint(data, out, *settings)
    for place in (out, tmp_path / "whole"):
        done = trainer(data, place, *settings, f"schedule.total_images={total}")
        assert done.returncode == 0, done.stderr
    assert hashes(out, total) == hashes(tmp_path / "whole", total)
    assert (out / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
