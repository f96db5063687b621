"""Parity: every exported file must make the same images as the PyTorch generator, from the same z."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from export.format.card import Parity, Precision, beside
from export.format.graph import tensors
from export.format.rows import of_classes
from export.samplers.base import Sampler
from pipeline.common.errors import DataError
from pipeline.common.imaging import Pixels, labeled_sheet, save_png
from pipeline.common.progress import Progress
from pipeline.common.randomness import Purpose
from pipeline.common.storage import is_url
from pipeline.config import NetworkConfig
from pipeline.model.latents import latents
from pipeline.model.networks import Generator
from pipeline.model.sampling import to_uint8

FLOAT_TOLERANCES = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2}
"""Largest difference of a value in [-1, 1] that passes, by precision."""
UINT8_TOLERANCE = 1
SHARE_TOLERANCES = {"fp32": 0.005, "tf32": 0.2, "fp16": 0.2}
"""Largest share of differing uint8 values that passes. Measured shares (32 to 128 pixels, low and high contrast, ONNX
Runtime and OpenVINO): float32 up to 0.00016, TF32 0.029 to 0.09, fp16 0.021 to 0.1. So this finds TF32 in place of
float32 even in a file that outputs uint8 only."""
IMAGES = 10_000
SEED = 20_151_119  # arbitrary: the day the paper appeared

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Reference:
    """The images that an exported file is compared with."""

    name: str
    network: NetworkConfig
    run: Callable[[Floats], Floats]
    """Rows (a sampler's) -> float images (N, C, H, W)."""


@dataclass(frozen=True)
class Candidate:
    """One way to run an exported file."""

    open_at: Callable[[int], Sampler]
    """Block size -> sampler."""
    floats: Callable[[Sampler, Floats], Floats | None] = lambda sampler, z: None
    """Float images (N, C, H, W) of the same z, or None if the file does not output them."""


@dataclass
class Comparison:
    """Accumulated differences between the reference and one candidate."""

    images: int = 0
    max_float_error: float | None = None
    max_uint8_error: int = 0
    pixels: int = 0
    pixels_off: int = 0
    worst: tuple[Pixels, Pixels] | None = None
    """Reference and result of the image with the largest sum of differences."""
    _worst_sum: int = field(default=-1, repr=False)

    def add_floats(self, reference: Floats, result: Floats) -> None:
        """Compare float images (N, C, H, W). NaN counts as an infinite difference."""
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
    reference: Reference, candidates: list[Candidate], *, max_batch: int, images: int = IMAGES, precision: Precision
) -> list[tuple[Parity, Comparison]]:
    """Compare every candidate with the reference on the same z. The reference runs once for all of them.

    Compares batches of 1, 7 and `max_batch`, the last over `images` images.
    """
    network = reference.network
    compared = [Comparison() for _ in candidates]
    backends = [""] * len(candidates)
    blocks_at = {1: 1, min(7, max_batch): 1, max_batch: -(-images // max_batch)}  # blocks compared at each batch size
    with Progress("parity", sum(batch * blocks for batch, blocks in blocks_at.items())) as progress:
        for batch, blocks in blocks_at.items():
            with ExitStack() as stack:
                samplers = [stack.enter_context(candidate.open_at(batch)) for candidate in candidates]
                backends = [f"{sampler.backend}/{sampler.provider}" for sampler in samplers]
                for start in range(0, blocks * batch, batch):
                    z = _rows(network, start, batch)
                    floats = reference.run(z)
                    pixels = to_uint8(torch.from_numpy(floats)).numpy()
                    for candidate, sampler, comparison in zip(candidates, samplers, compared, strict=True):
                        comparison.add_pixels(pixels, sampler.sample(z))
                        if (result := candidate.floats(sampler, z)) is not None:
                            comparison.add_floats(floats, result)
                    progress.advance(batch)
    return [
        (
            Parity(
                reference=reference.name,
                backend=backend,
                batches=list(blocks_at),
                images=comparison.images,
                max_float_error=comparison.max_float_error,
                max_uint8_error=comparison.max_uint8_error,
                share_of_pixels_off=comparison.pixels_off / comparison.pixels,
                float_bar=FLOAT_TOLERANCES[precision],
                uint8_bar=UINT8_TOLERANCE,
                share_bar=SHARE_TOLERANCES[precision],
            ),
            comparison,
        )
        for backend, comparison in zip(backends, compared, strict=True)
    ]


def _rows(network: NetworkConfig, start: int, count: int) -> Floats:
    """Return the rows that are compared: z, and of a conditional network one class after the other."""
    z = latents(SEED, Purpose.BENCHMARK, start, count, network.latent_dim, network.latent_distribution)
    if not network.label:
        return z
    return np.concatenate([z, of_classes(network, np.arange(start, start + count) % len(network.classes))], 1)


def of_generator(generator: Generator) -> Reference:
    """Return the reference of every export: the network as trained, with BatchNorm not folded."""

    def run(rows: Floats) -> Floats:
        with torch.inference_mode():
            images: Floats = generator(*tensors(generator.config, torch.from_numpy(rows))).numpy()
        return images

    return Reference("PyTorch", generator.config, run)


def require(measured: list[tuple[Parity, Comparison]], model: str) -> list[Parity]:
    """Return the records.

    Raises DataError for the first record beyond its tolerances, and saves its worst pair of images beside `model`.
    """
    for parity, compared in measured:
        far = []
        if (parity.max_float_error or 0.0) > parity.float_bar:
            far.append(f"{parity.max_float_error:.2g} in [-1, 1] (at most {parity.float_bar:g})")
        if parity.max_uint8_error > parity.uint8_bar:
            far.append(f"{parity.max_uint8_error} gray levels (at most {parity.uint8_bar})")
        if parity.share_bar is not None and parity.share_of_pixels_off > parity.share_bar:
            far.append(f"{parity.share_of_pixels_off:.2%} of the values (at most {parity.share_bar:.1%})")
        if far:
            name = f"{Path(model).stem}_parity_failure.png"
            picture = Path(name if is_url(model) else beside(model, name))
            save_png(picture, _picture(compared, parity.reference))
            raise DataError(
                f"{model}: differs from {parity.reference} by {' and '.join(far)} over {parity.images} images on "
                f"{parity.backend}; {picture} shows the worst pair"
            )
    return [parity for parity, _ in measured]


def _picture(compared: Comparison, name: str) -> Pixels:
    assert compared.worst is not None
    reference, result = (image.astype(np.int16) for image in compared.worst)
    error = np.abs(reference - result)
    visible = (error * (255 // max(int(error.max()), 1))).astype(np.uint8)
    rows = [
        (name, compared.worst[0]),
        ("exported", compared.worst[1]),
        (f"difference x{255 // max(int(error.max()), 1)}", visible),
    ]
    return labeled_sheet([(caption, image[None].repeat(4, 1).repeat(4, 2)) for caption, image in rows], 1)


def describe(parity: Parity) -> str:
    """Return a record as one line of text."""
    floats = share = ""
    if parity.max_float_error is not None:
        floats = f"float difference {parity.max_float_error:.1e} (at most {parity.float_bar:g}), "
    if parity.share_bar is not None:
        share = f" (at most {parity.share_bar:.1%})"
    stand_in = "" if parity.reference == "PyTorch" else f"with {parity.reference} in place of the weights, "
    return (
        f"parity {stand_in}over {parity.images:,} images at batch {', '.join(map(str, parity.batches))} on "
        f"{parity.backend}: {floats}uint8 difference {parity.max_uint8_error} (at most {parity.uint8_bar}), "
        f"{parity.share_of_pixels_off:.2%} of the values differ{share}"
    )
