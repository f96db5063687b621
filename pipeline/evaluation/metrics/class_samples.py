"""Samples with the class that each was made to show: of a conditional checkpoint, or as files with labels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import Pixels
from pipeline.common.randomness import Purpose
from pipeline.config import NetworkConfig
from pipeline.data.classes import read_classes, written
from pipeline.data.dataset import Dataset
from pipeline.data.labeled import Labeled, load_labeled
from pipeline.data.shard_reader import iterate
from pipeline.evaluation import inputs
from pipeline.evaluation.images import BLOCK, ArrayImages
from pipeline.model.labels import draw_classes, label_values
from pipeline.model.latents import latents
from pipeline.model.networks import Generator
from pipeline.model.sampling import images_of

Places = NDArray[np.int64]
"""A number of a class for each image (N,)."""


@dataclass(frozen=True)
class ClassSamples:
    """What is measured: its classes in their order, and where samples of them come from."""

    network: NetworkConfig
    """Of samples as files, only the label and its classes."""
    description: dict[str, Any]
    shape: tuple[int, int, int]
    source: Generator | Dataset

    def of_class(self, place: int, count: int, seed: int) -> Pixels:
        """Return `count` samples of a class, fewer if there are fewer files. All classes have the same z."""
        if isinstance(self.source, Dataset):
            images, places = self._files
            return images[np.flatnonzero(places == place)[:count]]
        z = latents(seed, Purpose.EVALUATE, 0, count, self.network.latent_dim, self.network.latent_distribution)
        return images_of(self.source, z, label_values(self.network, np.full(count, place)))

    def blocks(self, count: int, seed: int) -> Iterator[tuple[Pixels, Places]]:
        """Yield `count` samples and their classes, block by block: files in their order, others of each class in turn.

        Fewer if there are fewer files.
        """
        if isinstance(self.source, Dataset):
            for images, columns in iterate(self.source, batch=BLOCK, labels=True, limit=count):
                yield images, places_of(columns, self.network)
            return
        network = self.network
        for start in range(0, count, BLOCK):
            number = min(BLOCK, count - start)
            z = latents(seed, Purpose.EVALUATE, start, number, network.latent_dim, network.latent_distribution)
            places = draw_classes(network, seed, Purpose.EVALUATE, start, number, "balanced")
            yield images_of(self.source, z, label_values(network, places)), places

    @cached_property
    def _files(self) -> tuple[Pixels, Places]:
        assert isinstance(self.source, Dataset)
        labeled = load_labeled(self.source)
        return labeled.images, places_of(labeled.columns, self.network)


def open_class_samples(ckpt: str | None, samples: str | None, label: Sequence[str]) -> ClassSamples:
    """Return the samples that `--ckpt` or `--samples` names, and `--label` of files.

    Raises UsageError unless exactly one of the two is named, for files without a label and networks without one.
    """
    if (ckpt is None) == (samples is None):
        raise UsageError("give either --ckpt (a checkpoint) or --samples (images), and not both")
    if ckpt is None:
        return _of_files(str(samples), label)
    loaded, description = inputs.conditional(ckpt)
    if label and tuple(label) != loaded.config.label:
        raise UsageError(f"--label {','.join(label)}: {ckpt} is conditioned on {', '.join(loaded.config.label)}")
    return ClassSamples(loaded.config, description, inputs.shape_of(loaded.config), loaded.generator)


def _of_files(location: str, label: Sequence[str]) -> ClassSamples:
    images, description = inputs.fakes(None, location, 2**48, 0)
    dataset = inputs.data_set(location)
    planned = dataset.source.get("labels")
    label = label or (planned.get("label", ()) if isinstance(planned, dict) else ())
    if not label:
        raise UsageError(f"--samples {location}: name what they were made to show: --label NAME, or NAME,NAME")
    names = read_classes(dataset, label, "--label").names
    network = NetworkConfig(label=tuple(label), classes=names)
    return ClassSamples(network, description, images.shape, dataset)


def load_reals(
    data: str, samples: ClassSamples, limit: int | None = None, *, option: str = "--data"
) -> tuple[Labeled, Places]:
    """Return the real images of the samples' classes (at most `limit` of all), in memory, and their classes.

    Raises UsageError for images of another size, DataError when one of the classes has no image.
    """
    network = samples.network
    dataset = inputs.data_set(data, samples.shape)
    found = read_classes(dataset, network.label, option).names
    titles = zip(network.class_titles, network.classes, strict=True)
    if absent := [title for title, name in titles if name not in found]:
        raise DataError(f"{data}: has no images of class {absent[0]} (and of {len(absent) - 1} others)")
    reals = load_labeled(dataset, limit)
    reals = replace(reals, description={**reals.description, "preparation": inputs.preparation(dataset)})
    inputs.check_same_shape(ArrayImages(np.empty((1, *samples.shape), np.uint8)), ArrayImages(reals.images[:1]))
    places = places_of(reals.columns, network)
    if len(known := np.flatnonzero(places >= 0)) < len(places):  # classes that the samples do not have
        reals, places = reals.take(known), places[known]
    return reals, places


def places_of(columns: Mapping[str, Any], network: NetworkConfig) -> Places:
    """Return the number of each image's class, of columns of labels; -1 of a class that `network` does not have."""
    number = {name: place for place, name in enumerate(network.classes)}
    values = [np.asarray(columns[name], object).tolist() for name in network.label]
    texts = (written(row if len(row) > 1 else row[0]) for row in zip(*values, strict=True))
    return np.array([number.get(text, -1) for text in texts], np.int64)
