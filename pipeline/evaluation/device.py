"""Where the networks and the arithmetic of an evaluation run, and how images get there."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from pipeline.common.imaging import Pixels
from pipeline.common.shapes.frame import over
from pipeline.model.sampling import to_float


def device() -> str:
    """Return the device that networks run on: the first GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def to_network(images: Pixels) -> Tensor:
    """Images uint8 (N, H, W, C) -> float32 (N, C, H, W) in [-1, 1], on the device."""
    return to_float(torch.from_numpy(np.ascontiguousarray(images)).to(device()))


BACKGROUND = "white"
"""What images with transparency are laid on before anything is measured of them, as builds without it do."""


def opaque(images: Pixels) -> Pixels:
    """Images uint8 (N, H, W, C) as they are measured: RGBA over BACKGROUND, RGB; others as they are."""
    return over(images, 255) if images.shape[-1] == 4 else images


def background(shape: tuple[int, ...]) -> dict[str, str]:
    """Return what a result's settings say of images (height, width, channels): {"background": …} of RGBA, else {}."""
    return {"background": BACKGROUND} if shape[-1] == 4 else {}


def to_maps(images: Pixels, device: torch.device | str) -> Tensor:
    """Images uint8 (N, H, W, C) -> float32 (N, C, H, W) in [0, 255], contiguous, on `device`; RGBA as `opaque` is."""
    return torch.tensor(opaque(images), device=device).permute(0, 3, 1, 2).float().contiguous()


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 matrices on a GPU in float32: TF32, which training may have chosen, keeps only ten bits."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
