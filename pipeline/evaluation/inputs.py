"""What --ckpt, --samples and --data name, opened, each with its description for the results."""

import atexit
import functools
import shutil
import tempfile
from dataclasses import replace
from typing import Any, cast

import torch

from pipeline.checkpoints.reference import (
    LoadedDiscriminator,
    LoadedGenerator,
    load_discriminator,
    load_generator,
)
from pipeline.common.errors import DataError, UsageError
from pipeline.common.shapes.size import Channels, written
from pipeline.common.storage import public_name
from pipeline.config import NetworkConfig
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.index.indexer import make_index
from pipeline.data.sources.recognize import is_packed
from pipeline.data.specification import expand, is_dataset, is_specification
from pipeline.evaluation.device import device
from pipeline.evaluation.images import GeneratedImages, Images, ShardImages
from pipeline.evaluation.pictures import FILTER, open_pictures
from pipeline.model.conditional import OfClass
from pipeline.model.labels import named_label, names_in


def any_generator(ckpt: str) -> tuple[LoadedGenerator, dict[str, Any]]:
    """Return the generator that `--ckpt` names, on the device, with its description for the results.

    It may read a label beside z.
    """
    return _on_device(load_generator(ckpt))


def generator(ckpt: str, label: str | None = None) -> tuple[LoadedGenerator, dict[str, Any]]:
    """Return the generator that `--ckpt` names, as `any_generator` does, as one of z alone.

    All images of a conditional one are of the class `label`. Raises UsageError for one whose class is not named, for a
    class that it does not have, and for a `label` of a generator without one.
    """
    loaded, description = any_generator(ckpt)
    if label is None and loaded.config.label:
        raise UsageError(
            f"{ckpt}: is conditioned on {', '.join(loaded.config.label)}, and this command makes images of z alone; "
            f"choose their class, such as --label {loaded.config.class_titles[0]!r}"
        )
    if label is None:
        return loaded, description
    _require_label(ckpt, loaded.config, label)
    made = OfClass(loaded.generator, torch.from_numpy(named_label(loaded.config, label, "--label")))
    made.to(device()).eval().requires_grad_(False)
    return replace(loaded, generator=made, config=made.config), {**description, "label": label}


def class_names(ckpt: str, network: NetworkConfig, label: str | None) -> list[str]:
    """Return the classes that `--label`, such as `3,5,8`, names: by default all, none of a generator without them."""
    if label is None:
        return list(network.class_titles)
    _require_label(ckpt, network, label)
    return names_in(network, label)


def _require_label(ckpt: str, network: NetworkConfig, label: str) -> None:
    if not network.label:
        raise UsageError(f"--label {label}: {ckpt} is not conditioned on a label; leave it out")


def conditional(ckpt: str) -> tuple[LoadedGenerator, dict[str, Any]]:
    """Return the conditional generator that `--ckpt` names, as `any_generator` does. UsageError for another."""
    loaded = load_generator(ckpt)
    if not loaded.config.label:
        raise UsageError(f"{ckpt}: is not conditioned on a label, so no class can be wanted; train with network.label")
    return _on_device(loaded)


def _on_device(loaded: LoadedGenerator) -> tuple[LoadedGenerator, dict[str, Any]]:
    loaded.generator.to(device()).requires_grad_(False)
    return loaded, {"kind": f"generator ({loaded.kind})", **_describe(loaded)}


def discriminator(ckpt: str) -> tuple[LoadedDiscriminator, dict[str, Any]]:
    """Return the discriminator that `--ckpt` names, on the device, with its description for the results.

    Raises ConfigConflict for one whose features need a label beside the images.
    """
    loaded = load_discriminator(ckpt)
    height, width, channels = loaded.config.image_shape
    next(loaded.discriminator.activations(torch.zeros(1, channels, height, width)))  # refused before any other work
    loaded.discriminator.to(device()).requires_grad_(False)
    return loaded, {"kind": "discriminator", **_describe(loaded)}


def _describe(loaded: LoadedGenerator | LoadedDiscriminator) -> dict[str, Any]:
    return {
        "source": loaded.reference,
        "sha256": loaded.sha256,
        "images_seen": loaded.images_seen,
        "network": loaded.config.model_dump(),
    }


def data_set(location: str, shape: tuple[int, int, int] | None = None, limit: int | None = None) -> Dataset:
    """Return the data set that --data or --samples names: ours, anyone's tars, or what `dcgan-data build` reads.

    The images of others become (height, width, channels) `shape`, or stay as they are. Of what is no tar, at least the
    first `limit` are there. Raises UsageError when they are not all of one size and there is no `shape`.
    """
    if is_packed(location):
        return open_pictures(location, shape, limit)
    if is_specification(location):
        return _index(location, shape)
    return open_dataset(location) if is_dataset(location) else open_pictures(location, shape, limit)


def preparation(dataset: Dataset) -> str:
    """Return what was done to the pictures before they are measured, as far as this process did it."""
    if dataset.encoding == "tar":
        height, width, _ = dataset.image_shape
        part = "square" if width == height else "part of the images' proportion"
        return f"pictures of other sizes cropped to their central {part} and resized to {width}x{height} by {FILTER}"
    return str(dataset.source.get("preparation", "as the data set stores them"))


@functools.cache
def _index(spec: str, shape: tuple[int, int, int] | None) -> Dataset:
    """Return a data set of anyone's tars, whose index lives as long as this process."""
    folder = tempfile.mkdtemp(prefix="dcgan-index-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    height, width, channels = shape or (1, 1, 3)
    size = written(width, height)
    dataset = make_index(expand(spec), folder, spec=spec, size=size, channels=cast(Channels, channels))
    assert dataset is not None  # not a part
    if shape is not None:
        return dataset
    sizes = {*zip(dataset.columns.width.tolist(), dataset.columns.height.tolist(), strict=True)}
    if len(sizes) > 1:
        sides = {side for size in sizes for side in size}
        raise UsageError(
            f"{spec}: its images have sides of {min(sides)} to {max(sides)} pixels, not all one size; choose it: "
            f"dcgan-data index {spec} OUT --size N, and name OUT"
        )
    return dataset.model_copy(update={"image_size": written(*sizes.pop())})


def preparations(samples: dict[str, Any], data: dict[str, Any] | None) -> dict[str, str]:
    """Return what a protocol says of the images themselves, from the descriptions of `fakes` and `reals`."""
    told = {"samples": samples.get("preparation", "as the generator makes them")}
    return told | ({"real_images": data["preparation"]} if data else {})


def fakes(ckpt: str | None, samples: str | None, count: int, seed: int) -> tuple[Images, dict[str, Any]]:
    """Return the images to evaluate: `count` fresh samples of a checkpoint, or the first `count` of samples as files.

    Raises UsageError unless exactly one of the two is named.
    """
    if (ckpt is None) == (samples is None):
        raise UsageError("give either --ckpt (a checkpoint) or --samples (images), and not both")
    if ckpt is not None:
        loaded, description = _on_device(load_generator(ckpt))
        return GeneratedImages(loaded.generator, count, seed), description
    assert samples is not None
    images = ShardImages(data_set(samples, limit=count), count)
    _check_set(images, samples)
    return images, {
        "kind": "samples",
        "source": public_name(samples),
        "sha256": images.dataset.fingerprint(),
        "preparation": preparation(images.dataset),
    }


def reals(
    data: str, count: int | None, shape: tuple[int, int, int] | None = None
) -> tuple[ShardImages, dict[str, Any]]:
    """Return the first `count` images of a data set (all, when it has fewer), with its description.

    Images of others become (height, width, channels) `shape`.
    """
    images = ShardImages(data_set(data, shape, count), count)
    _check_set(images, data)
    return images, {
        "location": public_name(data),
        "fingerprint": images.dataset.fingerprint(),
        "images": images.dataset.source.get("listed", images.dataset.images),
        "used": images.count,
        "preparation": preparation(images.dataset),
    }


def _check_set(images: ShardImages, location: str) -> None:
    if images.count < 2:
        raise DataError(f"{location}: {images.count} image, too few to measure; expected at least 2")


def check_same_shape(fakes: Images, reals: Images) -> None:
    """Raise UsageError unless the samples and the real images have one shape."""
    if fakes.shape != reals.shape:
        raise UsageError(
            f"the samples are {_in_words(fakes.shape)}, the images of --data are {_in_words(reals.shape)}: "
            "build the data at that size"
        )


def check_fits(config: NetworkConfig, shape: tuple[int, ...]) -> None:
    """Raise UsageError unless a network of `config` can read images (height, width, channels)."""
    expected = shape_of(config)
    if tuple(shape) != expected:
        raise UsageError(
            f"the images of --data are {_in_words(shape)}, the discriminator expects {_in_words(expected)}: "
            "build the data at that size"
        )


def shape_of(config: NetworkConfig) -> tuple[int, int, int]:
    """Return the height, width and channels of the images that a network of `config` makes and reads."""
    return config.image_shape


def _in_words(shape: tuple[int, ...]) -> str:
    height, width, channels = shape
    return f"{width}x{height}, {channels} channel{'s' if channels > 1 else ''}"
