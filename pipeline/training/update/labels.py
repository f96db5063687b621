"""The labels of each update: those of its real images, and those that its fakes are made with."""

from collections.abc import Iterable, Iterator
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from pipeline.common.randomness import Purpose
from pipeline.config import MOST_STRETCHED, RunConfig
from pipeline.data.classes import Classes, read_classes
from pipeline.data.dataset import Dataset
from pipeline.data.loading.loader import mix_of
from pipeline.data.loading.shuffle import Shuffle
from pipeline.model.labels import draw_labels, label_values

AHEAD_IMAGES = 8192
"""Images that are located at once: numpy's fixed costs vanish among so many."""

Labels = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Of the real images and of the fakes of this rank's share of a batch, each (batch / world_size, label_dim)."""


def with_aspect(config: RunConfig, dataset: Dataset) -> RunConfig:
    """Return the settings with the proportion of the pictures, where the data set has stretched them."""
    aspect = dataset.aspect and min(max(dataset.aspect, 1 / MOST_STRETCHED), MOST_STRETCHED)
    return config.model_copy(update={"network": config.network.model_copy(update={"aspect": aspect})})


def with_classes(config: RunConfig, dataset: Dataset) -> tuple[RunConfig, Classes | None]:
    """Return the settings with the classes of `network.label` in the data set, and the class of every image.

    A network without a label stays as it is. Raises what `read_classes` raises, and ConfigConflict when
    `network.classes` names others than the data has.
    """
    network = config.network
    if not network.label:
        return config, None
    classes = read_classes(dataset, network.label)
    if network.classes:
        classes = classes.in_order(network.classes, "network.classes")
    known = {"classes": classes.names, "class_images": classes.images}
    return config.model_copy(update={"network": network.model_copy(update=known)}), classes


def label_blocks(
    config: RunConfig, dataset: Dataset, classes: Classes | None, *, start: int, rank: int = 0, world_size: int = 1
) -> Iterator[Iterable[Labels | None]]:
    """Yield blocks of the labels of one batch of a run after the other, from image `start` on, without end.

    The label of a real image is that of the image that the loader gives at its position (contract 3). Without labels,
    all are None.
    """
    recipe, network = config.recipe, config.network
    if classes is None:
        while True:
            yield repeat(None)
    shuffle = Shuffle(dataset.shards.images, seed=recipe.seed, streams=recipe.streams, mix=mix_of(config, dataset))
    batches = max(1, AHEAD_IMAGES // recipe.batch)
    while True:
        images = np.arange(start + rank, start + batches * recipe.batch, world_size, dtype=np.int64)
        real = label_values(network, classes.of_image[shuffle.ids(images)])
        fake = draw_labels(network, recipe.seed, Purpose.TRAIN, start, batches * recipe.batch)[rank::world_size]
        yield zip(np.split(real, batches), np.split(fake, batches), strict=True)
        start += batches * recipe.batch
