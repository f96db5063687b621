"""What --ckpt, --samples and --data name, opened, each with its description for the results."""

from typing import Any

from pipeline.checkpoints.reference import LoadedDiscriminator, LoadedGenerator, load_discriminator, load_generator
from pipeline.common.errors import DataError, UsageError
from pipeline.common.storage import public_name
from pipeline.config import NetworkConfig
from pipeline.data.dataset import open_dataset
from pipeline.evaluation.device import device
from pipeline.evaluation.images import GeneratedImages, Images, ShardImages


def generator(ckpt: str) -> tuple[LoadedGenerator, dict[str, Any]]:
    """Return the generator that `--ckpt` names, on the device, with its description for the results."""
    loaded = load_generator(ckpt)
    loaded.generator.to(device()).requires_grad_(False)
    return loaded, {"kind": f"generator ({loaded.kind})", **_describe(loaded)}


def discriminator(ckpt: str) -> tuple[LoadedDiscriminator, dict[str, Any]]:
    """Return the discriminator that `--ckpt` names, on the device, with its description for the results."""
    loaded = load_discriminator(ckpt)
    loaded.discriminator.to(device()).requires_grad_(False)
    return loaded, {"kind": "discriminator", **_describe(loaded)}


def _describe(loaded: LoadedGenerator | LoadedDiscriminator) -> dict[str, Any]:
    return {
        "source": loaded.reference,
        "sha256": loaded.sha256,
        "images_seen": loaded.images_seen,
        "network": loaded.config.model_dump(),
    }


def fakes(ckpt: str | None, samples: str | None, count: int, seed: int) -> tuple[Images, dict[str, Any]]:
    """Return the images to evaluate: `count` fresh samples of a checkpoint, or the first `count` of sample shards.

    Raises UsageError unless exactly one of the two is named.
    """
    if (ckpt is None) == (samples is None):
        raise UsageError("give either --ckpt (a checkpoint) or --samples (a folder of sample shards), and not both")
    if ckpt is not None:
        loaded, description = generator(ckpt)
        return GeneratedImages(loaded.generator, count, seed), description
    assert samples is not None
    images = ShardImages(open_dataset(samples), count)
    _check_set(images)
    return images, {"kind": "samples", "source": public_name(samples), "sha256": images.dataset.fingerprint()}


def reals(data: str, count: int | None) -> tuple[ShardImages, dict[str, Any]]:
    """Return the first `count` images of a data set (all, when it has fewer), with its description."""
    images = ShardImages(open_dataset(data), count)
    _check_set(images)
    return images, {
        "location": public_name(images.dataset.location),
        "fingerprint": images.dataset.fingerprint(),
        "images": images.dataset.images,
        "used": images.count,
    }


def _check_set(images: ShardImages) -> None:
    if images.count < 2:
        raise DataError(f"{images.dataset.location}: {images.count} image, too few to measure; expected at least 2")


def check_same_shape(fakes: Images, reals: Images) -> None:
    """Raise UsageError unless the samples and the real images have one shape."""
    if fakes.shape != reals.shape:
        raise UsageError(
            f"the samples are {_in_words(fakes.shape)}, the images of --data are {_in_words(reals.shape)}: "
            "build the data at that size"
        )


def check_fits(config: NetworkConfig, shape: tuple[int, ...]) -> None:
    """Raise UsageError unless a network of `config` can read images (height, width, channels)."""
    expected = (config.image_size, config.image_size, config.channels)
    if tuple(shape) != expected:
        raise UsageError(
            f"the images of --data are {_in_words(shape)}, the discriminator expects {_in_words(expected)}: "
            "build the data at that size"
        )


def _in_words(shape: tuple[int, ...]) -> str:
    height, width, channels = shape
    return f"{width}x{height}, {channels} channel{'s' if channels > 1 else ''}"
