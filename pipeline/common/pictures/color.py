"""Colors of pictures: what an embedded ICC profile says they are, turned into sRGB."""

import functools
import io
from typing import Any

import numpy as np
from PIL import Image

NEAR = 2
"""Gray levels by which an sRGB profile of any maker may differ from Little CMS's own, and stays untouched."""
_STEP = 15  # of the colors that are tried: 18 values of each channel
_MODES = {"RGB": "RGB", "RGBA": "RGB", "RGBX": "RGB", "L": "L", "LA": "L", "CMYK": "CMYK"}


def to_srgb(image: Image.Image) -> Image.Image:
    """Return a decoded image in sRGB, by its embedded profile: with perceptual intent, as pictures are shown.

    RGB, gray and CMYK are converted, and alpha is kept. Palettes and more than 8 bits stay as they are, as does an
    image whose profile is sRGB, broken, or of another color space.
    """
    profile, mode = image.info.get("icc_profile"), _MODES.get(image.mode)
    if not isinstance(profile, bytes) or mode is None or (transform := _transform(profile, mode)[1]) is None:
        return image
    from PIL import ImageCms

    converted = ImageCms.applyTransform(image if image.mode == mode else image.convert(mode), transform)
    assert converted is not None
    if mode == "L":
        converted = converted.getchannel(1)
    if image.mode in ("RGBA", "LA"):
        converted.putalpha(image.getchannel("A"))
    return converted


def is_srgb(profile: bytes) -> bool:
    """Whether a profile leaves the colors of every image as they are."""
    return all(_transform(profile, mode)[1] is None for mode in ("RGB", "L", "CMYK"))


def keeps_other_colors(image: Image.Image) -> bool:
    """Whether an image, opened or decoded, has a profile that `to_srgb` cannot use: its colors are taken as sRGB."""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes):
        return False
    mode = _MODES.get(image.mode)
    readable, transform = _transform(profile, mode or "RGB")
    return not readable or (mode is None and transform is not None)


@functools.lru_cache(maxsize=64)  # a camera's or a program's pictures share one profile
def _transform(profile: bytes, mode: str) -> tuple[bool, Any]:
    """Return whether a profile can be read for `mode`, and what turns such an image into sRGB, or None for nothing."""
    from PIL import ImageCms

    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.PERCEPTUAL,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return False, None
    if mode == "CMYK":
        return True, transform
    levels = np.arange(0, 256, 1 if mode == "L" else _STEP, dtype=np.uint8)
    colors = levels[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    made = ImageCms.applyTransform(Image.fromarray(colors), transform)
    before = np.repeat(colors[..., None], 3, 2) if mode == "L" else colors
    near = np.abs(np.asarray(made, np.int16) - before).max() <= NEAR
    return True, None if near else transform
