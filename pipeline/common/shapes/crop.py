"""Which part of a picture is taken before it is brought to its size: a box in pixels, by itself or by a known name."""

import re
from typing import NamedTuple

from PIL import Image


class Box(NamedTuple):
    """A part of a picture, in its pixels."""

    left: int
    top: int
    width: int
    height: int


CELEBA = (178, 218)
"""Width and height of CelebA's aligned pictures."""
NAMED = {
    "celeba-108": Box(35, 55, 108, 108),
    "celeba-128": Box(25, 57, 128, 128),
    "celeba-148": Box(15, 35, 148, 148),
}
"""The crops of CelebA that results are published with.

108: the central part, of carpedm20/DCGAN-tensorflow (`--input_height 108 --crop`), by far the most copied.
128: around (89, 121), of tkarras/progressive_growing_of_gans (`create_celeba` of dataset_tool.py), and StyleGAN's.
148: the central part, of AntixK/PyTorch-VAE (`CenterCrop(148)`), and of most autoencoders since.
"""
_BOX = re.compile(r"(\d{1,6}),(\d{1,6}),(\d{1,6}),(\d{1,6})")
FORMS = f"X,Y,W,H in pixels, or {', '.join(NAMED)}"


def parse_crop(crop: str) -> Box:
    """Return the box that a crop stands for. Raises ValueError."""
    if crop in NAMED:
        return NAMED[crop]
    match = _BOX.fullmatch(crop)
    if match is None:
        raise ValueError(f"expected {FORMS}")
    box = Box(*map(int, match.groups()))
    if not (box.width and box.height):
        raise ValueError("expected X,Y,W,H with a width and a height of at least 1")
    return box


def check_crop(crop: str) -> str:
    """Return a crop that `cut` takes, '' for none. Raises ValueError."""
    if crop:
        parse_crop(crop)
    return crop


def cut(image: Image.Image, crop: str) -> Image.Image:
    """Return a part of an upright picture. Raises ValueError with the reason when it does not lie within."""
    box = parse_crop(crop)
    if crop in NAMED and image.size != CELEBA:
        raise ValueError(f"not of {CELEBA[0]}x{CELEBA[1]} pixels, as --crop {crop} wants")
    right, bottom = box.left + box.width, box.top + box.height
    if right > image.width or bottom > image.height:
        raise ValueError(f"smaller than --crop {crop}")
    return image.crop((box.left, box.top, right, bottom))
