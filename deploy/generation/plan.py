"""The plan of a generation: which images, from which model, in which shards."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from deploy.generation.labels import LabelPlan, LabelValue
from pipeline.common.imaging import Format
from pipeline.common.records import LARGEST, Record
from pipeline.common.shapes.size import Channels, between, parse_size
from pipeline.common.storage import sha256_bytes
from pipeline.data.dataset import LARGEST_IMAGE, Encoding, LabelType
from pipeline.model.latents import Distribution

SHARD_BYTES = 32_000_000
# Bytes of an encoded image over those of its pixels, and bytes of its tar headers and key. Both are upper estimates,
# because 32 MB is a limit.
_ENCODED_SHARE = {"packed": 1.0, "png": 1.0, "webp": 0.3, "jpg": 0.3}
_OVERHEAD_BYTES = {"packed": 24, "png": 2048, "webp": 2048, "jpg": 2048}

LATER = ("layout", "latents_sha256", "labels")
"""Fields that plans did not always have."""


class Plan(Record):
    """Everything that decides the bytes of a generation, except the device. Parts of different plans never merge."""

    version: Literal[1] = 1
    model_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of the model file that made the images."""
    backend: str
    """The backend that ran the model. Backends agree within 1 LSB, not to the bit."""
    block_images: int = Field(ge=1, le=LARGEST)
    """Images in a block that the device computes at once. Blocks begin at multiples of it."""
    seed: int = Field(ge=0, lt=2**64)
    purpose: Literal["sample"] = "sample"
    """The latents are those of Purpose.SAMPLE."""
    start: int = Field(ge=0, le=LARGEST)
    """Index of the first image."""
    count: int = Field(ge=1, le=LARGEST)
    """Images in all parts together."""
    latent_dim: int = Field(ge=1)
    latent_distribution: Distribution
    image_size: between(1, LARGEST_IMAGE)  # type: ignore[valid-type]
    """Pixels: 64 is a square, "96x64" is width x height."""
    channels: Channels
    format: Encoding
    quality: int | None
    """Quality of jpg and webp; null for packed and png."""
    shard_images: int = Field(ge=1, le=LARGEST)
    """Images in a full shard. Shards begin at multiples of it. Of plain pictures: the unit that parts share."""
    layout: Literal["folder"] | None = None
    """`folder`: a file for each image; null: shards."""
    latents_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """Hash of the z that were given, float32 (count, latent_dim); null: those of `seed`."""

    labels: LabelPlan | None = None
    """The labels of a conditional model's images; null: a model without."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the later fields where they are null: plans of before keep their text and hash."""
        values: dict[str, Any] = dump(self)
        return {key: value for key, value in values.items() if value is not None or key not in LATER}

    @property
    def label_types(self) -> dict[str, LabelType]:
        """Labels that lie beside each image, and their types."""
        return {} if self.labels is None else self.labels.types

    def label_values(self, start: int, count: int) -> list[tuple[LabelValue, ...]]:
        """Return the values of the labels of images `start` to `start + count`, in the order of `label_types`."""
        return [()] * count if self.labels is None else self.labels.values(self.seed, start, count)

    @property
    def file_format(self) -> Format:
        """The format of the pictures' files."""
        assert self.format != "packed"
        return self.format

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        width, height = parse_size(self.image_size)
        return height, width, self.channels

    def sha256(self) -> str:
        """Return the hash that all parts of one generation share."""
        return sha256_bytes(self.model_dump_json().encode())

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-(self.start + self.count) // self.shard_images) - self.start // self.shard_images

    def shards(self) -> list["ShardRange"]:
        """Return the shards in order. Each but the first begins at a multiple of `shard_images`."""
        return list(self.iterate_shards())

    def iterate_shards(self) -> Iterator["ShardRange"]:
        """Yield the shards in order."""
        end = self.start + self.count
        for aligned in range(self.start - self.start % self.shard_images, end, self.shard_images):
            yield ShardRange(max(aligned, self.start), min(aligned + self.shard_images, end))


@dataclass(frozen=True)
class ShardRange:
    """Images [start, end) of a generation: one shard."""

    start: int
    end: int

    @property
    def images(self) -> int:
        """Images in it."""
        return self.end - self.start

    @property
    def prefix(self) -> str:
        """The first part of its members' names."""
        return f"{self.start:012d}"


def default_shard_images(image_bytes: int, encoding: Encoding, label_bytes: int = 0) -> int:
    """Return the largest power of two of images, `image_bytes` each when decoded, that stays under SHARD_BYTES.

    `label_bytes` is what the labels of an image take at most.
    """
    expected = _ENCODED_SHARE[encoding] * image_bytes + _OVERHEAD_BYTES[encoding] + label_bytes
    return 1 << (int(SHARD_BYTES / expected).bit_length() - 1)
