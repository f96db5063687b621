"""What the options name: the model or samples to judge, and the images to judge them by."""

from typing import TYPE_CHECKING, Any

from pipeline.common.errors import DataError, UsageError
from pipeline.data.dataset import open_dataset
from pipeline.evaluation.images import GeneratedImages, Images, ShardImages

if TYPE_CHECKING:
    from pipeline.checkpoints.reference import LoadedDiscriminator, LoadedGenerator
    from pipeline.config import NetworkConfig


def device() -> str:
    """Return where networks run: the first GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def generator(ckpt: str) -> tuple["LoadedGenerator", dict[str, Any]]:
    """Return the generator that `--ckpt` names, on the device, with its description for the results."""
    from pipeline.checkpoints.reference import load_generator

    loaded = load_generator(ckpt)
    loaded.generator.to(device()).requires_grad_(False)
    return loaded, {"kind": f"generator ({loaded.kind})", **_describe(loaded)}


def discriminator(ckpt: str) -> tuple["LoadedDiscriminator", dict[str, Any]]:
    """Return the discriminator that `--ckpt` names, on the device, with its description for the results."""
    from pipeline.checkpoints.reference import load_discriminator

    loaded = load_discriminator(ckpt)
    loaded.discriminator.to(device()).requires_grad_(False)
    return loaded, {"kind": "discriminator", **_describe(loaded)}


def _describe(loaded: "LoadedGenerator | LoadedDiscriminator") -> dict[str, Any]:
    return {
        "source": loaded.source,
        "sha256": loaded.sha256,
        "images_seen": loaded.images_seen,
        "network": loaded.config.model_dump(),
    }


def fakes(ckpt: str | None, samples: str | None, count: int, seed: int) -> tuple[Images, dict[str, Any]]:
    """Return the images to judge: `count` fresh ones of a checkpoint, or those an engine wrote as shards."""
    if (ckpt is None) == (samples is None):
        raise UsageError("name what to judge: either --ckpt (a checkpoint) or --samples (a folder of sample shards)")
    if ckpt is not None:
        loaded, description = generator(ckpt)
        return GeneratedImages(loaded.generator, count, seed), description
    assert samples is not None
    images = ShardImages(open_dataset(samples), count)
    _check_set(images)
    return images, {"kind": "samples", "source": samples, "sha256": images.dataset.fingerprint()}


def reals(data: str, count: int | None) -> tuple[ShardImages, dict[str, Any]]:
    """Return the first `count` images of a data set (all, when it has fewer), with its description."""
    images = ShardImages(open_dataset(data), count)
    _check_set(images)
    return images, {
        "location": images.dataset.location,
        "fingerprint": images.dataset.fingerprint(),
        "images": images.dataset.images,
        "used": images.count,
    }


def _check_set(images: ShardImages) -> None:
    if images.count < 2:
        raise DataError(f"{images.dataset.location}: {images.count} image is no set to measure; expected at least 2")


def check_same_shape(ours: Images, theirs: Images, ours_name: str) -> None:
    """Raise UsageError unless both sets hold images of one shape."""
    if ours.shape != theirs.shape:
        raise UsageError(
            f"{ours_name} are {_words(ours.shape)}, the images of --data {_words(theirs.shape)}: "
            "build the data at that size"
        )


def check_fits(config: "NetworkConfig", shape: tuple[int, ...]) -> None:
    """Raise UsageError unless a network of `config` can read images (height, width, channels)."""
    expected = (config.image_size, config.image_size, config.channels)
    if tuple(shape) != expected:
        raise UsageError(
            f"the images of --data are {_words(shape)}, the discriminator reads {_words(expected)}: "
            "build the data at that size"
        )


def _words(shape: tuple[int, ...]) -> str:
    height, width, channels = shape
    return f"{width}x{height}, {channels} channel{'s' if channels > 1 else ''}"
