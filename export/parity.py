"""The gate of every export: the file must make the images that the PyTorch generator makes, from the same z."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from export.card import Parity
from export.graph import to_uint8
from export.samplers import Sampler
from pipeline.errors import DataError
from pipeline.imaging import Pixels, labelled_sheet, save_png
from pipeline.latents import latents
from pipeline.networks import Generator
from pipeline.progress import Progress
from pipeline.randomness import Purpose

FLOAT_BARS = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2}
"""Largest difference allowed of a value in [-1, 1], by precision."""
UINT8_BAR = 1
IMAGES = 10_000
SEED = 20_151_119  # any; the day the paper appeared

Floats = NDArray[np.float32]
FloatRunner = Callable[[Sampler, Floats], Floats | None]


@dataclass
class Comparison:
    """Running differences between the reference and a backend."""

    images: int = 0
    max_float_error: float | None = None
    max_uint8_error: int = 0
    pixels: int = 0
    pixels_off: int = 0
    worst: tuple[Pixels, Pixels] | None = None
    """Reference and result, the image whose sum of pixel differences is largest."""
    _worst_sum: int = field(default=-1, repr=False)

    def add_floats(self, reference: Floats, result: Floats) -> None:
        """Compare float images (N, C, H, W). NaN counts as infinitely far."""
        error = float(np.max(np.abs(reference - result)))
        self.max_float_error = max(self.max_float_error or 0.0, math.inf if math.isnan(error) else error)

    def add_pixels(self, reference: Pixels, result: Pixels) -> None:
        """Compare uint8 images (N, H, W, C)."""
        error = np.abs(reference.astype(np.int16) - result.astype(np.int16))
        sums = error.sum((1, 2, 3), dtype=np.int64)
        index = int(sums.argmax())
        if sums[index] > self._worst_sum:
            self._worst_sum = int(sums[index])
            self.worst = reference[index].copy(), result[index].copy()
        self.images += len(reference)
        self.max_uint8_error = max(self.max_uint8_error, int(error.max()))
        self.pixels += error.size
        self.pixels_off += int(np.count_nonzero(error))


def measure(
    generator: Generator,
    open_at: Callable[[int], Sampler],
    run_floats: FloatRunner,
    *,
    max_batch: int,
    images: int = IMAGES,
    float_bar: float,
) -> tuple[Parity, Comparison]:
    """Compare samplers of an exported file with `generator` (CPU, float32, eval) on the same z.

    `open_at(batch)` opens the file with that block size; `run_floats` returns its float images, or
    None where the file does not tell them. Batches 1, 7 and `max_batch` are compared, the last over `images`
    images.
    """
    config = generator.config
    compared = Comparison()
    backend = ""
    plan = {1: 1, min(7, max_batch): 1, max_batch: -(-images // max_batch)}  # batch: blocks compared at it
    with Progress("parity", sum(batch * blocks for batch, blocks in plan.items())) as progress:
        for batch, blocks in plan.items():
            with open_at(batch) as sampler:
                backend = f"{sampler.backend}/{sampler.provider}"
                for start in range(0, blocks * batch, batch):
                    z = latents(SEED, Purpose.BENCHMARK, start, batch, config.latent_dim, config.latent_distribution)
                    reference = run_reference(generator, z)
                    if start == 0 and (floats := run_floats(sampler, z)) is not None:
                        compared.add_floats(reference, floats)
                    compared.add_pixels(to_uint8(torch.from_numpy(reference)).numpy(), sampler.sample(z))
                    progress.advance(batch)
    return (
        Parity(
            backend=backend,
            batches=list(plan),
            images=compared.images,
            max_float_error=compared.max_float_error,
            max_uint8_error=compared.max_uint8_error,
            share_of_pixels_off=compared.pixels_off / compared.pixels,
            float_bar=float_bar,
            uint8_bar=UINT8_BAR,
        ),
        compared,
    )


def run_reference(generator: Generator, z: Floats) -> Floats:
    """Return the float images (N, C, H, W) of the network as trained, BatchNorm not folded."""
    with torch.inference_mode():
        images: Floats = generator(torch.from_numpy(z)).numpy()
    return images


def require(parity: Parity, compared: Comparison, what: str, picture: Path) -> None:
    """Raise DataError unless `parity` is within its bars; the worst pair of images is saved as `picture`."""
    if (parity.max_float_error or 0.0) <= parity.float_bar and parity.max_uint8_error <= parity.uint8_bar:
        return
    save_png(picture, _picture(compared))
    floats = ""
    if parity.max_float_error is not None:
        floats = f"{parity.max_float_error:.2g} in [-1, 1] (at most {parity.float_bar:g} is allowed) and "
    raise DataError(
        f"{what}: differs from PyTorch by {floats}{parity.max_uint8_error} grey levels (at most {parity.uint8_bar}) "
        f"over {parity.images} images on {parity.backend}; the worst pair is in {picture}"
    )


def _picture(compared: Comparison) -> Pixels:
    assert compared.worst is not None
    reference, result = (image.astype(np.int16) for image in compared.worst)
    error = np.abs(reference - result)
    visible = (error * (255 // max(int(error.max()), 1))).astype(np.uint8)
    rows = [
        ("PyTorch", compared.worst[0]),
        ("exported", compared.worst[1]),
        (f"difference x{255 // max(int(error.max()), 1)}", visible),
    ]
    return labelled_sheet([(caption, image[None].repeat(4, 1).repeat(4, 2)) for caption, image in rows], 1)


def describe(parity: Parity) -> str:
    """Return one line for people."""
    floats = ""
    if parity.max_float_error is not None:
        floats = f"float difference {parity.max_float_error:.1e} (bar {parity.float_bar:g}), "
    return (
        f"parity over {parity.images:,} images at batch {', '.join(map(str, parity.batches))} on {parity.backend}: "
        f"{floats}uint8 at most {parity.max_uint8_error} (bar {parity.uint8_bar}), "
        f"{parity.share_of_pixels_off:.2%} of the values differ"
    )
