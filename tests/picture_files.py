"""Pictures and folders of them, made by the tests themselves."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.common.imaging import Pixels, encode


def make_picture(seed: int, width: int = 48, height: int = 40, channels: int = 3) -> Pixels:
    """Return a picture of smooth colors, different for every seed: (height, width, channels)."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    return picture if channels == 3 else picture[..., :1]


def make_folder(path: Path, count: int, *, classes: tuple[str, ...] = (), size: int = 32) -> Path:
    """Make a folder of PNGs, nested if `classes` are given."""
    for index in range(count):
        place = path / (classes[index % len(classes)] if classes else "")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index:04d}.png").write_bytes(encode(make_picture(index, size, size), "png"))
    return path


def as_bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return a Pillow image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tree(path: Path) -> dict[str, bytes]:
    """Return all files below `path` with their content."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
