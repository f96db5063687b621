"""The paper's hash for near-duplicates: a denoising ReLU autoencoder on 32×32 crops, its code cut to 128 bits.

Section 4.1.1 of Radford et al. 2016: 3072-128-3072, trained on the set itself; two images whose codes are
equal, or differ in a few bits, look the same. Codes are taken in whole numbers: equal images have equal codes
in every batch, on every number of threads and every machine.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import DataError
from pipeline.common.imaging import Pixels
from pipeline.common.randomness import Purpose, permutation, raw_bits
from pipeline.common.shapes.frame import over
from pipeline.common.storage import atomic_path

SIDE = 32
BITS = 128
INPUTS = SIDE * SIDE * 3
DROPOUT = 0.5
SHIFT = 1
BRIGHTNESS = 0.04
LEARNING_RATE = 1e-3
THRESHOLD_IMAGES = 1 << 14
WEIGHT_UNIT = 2.0**-20
"""Weights are rounded to multiples of it: sums of 3072 products with bytes are then exact in float64, in any order."""

Codes = NDArray[np.uint8]


class SemanticHash:
    """128-bit codes of images, learned from images."""

    def __init__(self, *, seed: int = 0, steps: int = 800, batch: int = 128) -> None:
        self.seed, self.steps, self.batch = seed, steps, batch
        self._weight: NDArray[np.float64] = np.zeros((BITS, INPUTS))
        self._threshold: NDArray[np.float64] = np.zeros(BITS)

    def fit(self, images: Pixels, *, progress: Any = None) -> "SemanticHash":
        """Train on images (N, H, W, 1 or 3), in a random order already or not; return itself.

        The loss is the squared error of the clean input from a corrupted one. The corruption is what codes should
        not see: half of the values masked (the paper's dropout), the picture shifted by up to a pixel, its
        brightness changed by up to 4 %. Each bit's threshold is the median of its unit before the ReLU, so that
        every bit halves the set.
        """
        import torch
        from torch import nn

        generator = torch.Generator().manual_seed(int(raw_bits(self.seed, Purpose.DEDUP, 0, 1)[0] >> 1))
        sample = _inputs(images[:THRESHOLD_IMAGES])
        mean = torch.from_numpy(sample.mean(0))
        encoder, decoder = nn.Linear(INPUTS, BITS), nn.Linear(BITS, INPUTS)
        for layer in (encoder, decoder):
            nn.init.normal_(layer.weight, 0.0, layer.in_features**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], LEARNING_RATE)
        for step in range(self.steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - step / self.steps)
            chosen = images[self._rows(step, len(images))]
            clean = torch.from_numpy(_inputs(chosen)) - mean
            down, right = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
            factor = 1 + BRIGHTNESS * (2 * torch.rand(len(chosen), 1, generator=generator) - 1)
            noisy = torch.from_numpy(_inputs(np.roll(chosen, (down, right), (1, 2)))) * factor - mean
            mask = torch.rand(clean.shape, generator=generator) >= DROPOUT
            loss = (decoder(encoder(noisy * mask).relu()) - clean).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if progress is not None:
                progress.advance(1)
        self._weight = np.rint(encoder.weight.detach().numpy().astype(np.float64) / WEIGHT_UNIT)
        self._threshold = np.median(self._units(images[:THRESHOLD_IMAGES]), 0)
        return self

    def codes(self, images: Pixels) -> Codes:
        """Return the codes of images (N, H, W, 1 or 3) as packed bits: (N, 16) uint8."""
        return np.packbits(self._units(images) > self._threshold, axis=1)

    def _units(self, images: Pixels) -> NDArray[np.float64]:
        """Return the code's units before the ReLU, up to scale and shift: whole numbers, (N, 128)."""
        units = np.empty((len(images), BITS))
        for start in range(0, len(images), 1024):
            piece = shrink(images[start : start + 1024])
            units[start : start + 1024] = piece.reshape(len(piece), INPUTS).astype(np.float64) @ self._weight.T
        return units

    def save(self, path: Path) -> None:
        """Write the weights as safetensors."""
        from safetensors.numpy import save_file

        with atomic_path(path) as temporary:
            tensors = {"weight": self._weight, "threshold": self._threshold}
            save_file(tensors, temporary, {"seed": str(self.seed), "steps": str(self.steps)})

    @classmethod
    def load(cls, path: Path) -> "SemanticHash":
        """Read what `save` wrote. Raises DataError."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(path)
            loaded = cls()
            shapes = loaded._weight.shape, loaded._threshold.shape
            loaded._weight, loaded._threshold = tensors["weight"], tensors["threshold"]
            if (loaded._weight.shape, loaded._threshold.shape) != shapes:
                raise KeyError(f"weights of {BITS} bits")
        except (SafetensorError, KeyError, FileNotFoundError) as error:
            raise DataError(f"{path}: not a semantic hash: {error}; `dcgan-data dedup` writes one") from None
        return loaded

    def _rows(self, step: int, total: int) -> NDArray[np.int64]:
        """Return which images a step trains on: epochs of random permutations."""
        per_epoch = max(1, total // self.batch)
        epoch, position = divmod(step, per_epoch)
        order = permutation(total, self.seed, Purpose.DEDUP, lane=epoch + 1)
        return order[position * self.batch : (position + 1) * self.batch]


def _inputs(images: Pixels) -> NDArray[np.float32]:
    """Return images as the network's input: (N, 3072), 0 to 1."""
    return shrink(images).reshape(len(images), INPUTS).astype(np.float32) / np.float32(255)


def shrink(images: Pixels) -> Pixels:
    """Return images (N, H, W, C) as (N, 32, 32, 3) by averaging over areas; gray is repeated, RGBA laid on white."""
    if images.shape[3] == 4:
        images = over(images, 255)
    height, width, channels = images.shape[1:]
    factor = height // SIDE
    if height == width == SIDE * factor and factor <= 16:
        # Sums of up to 256 bytes fit 16 bits; strided slices are ten times as fast as a general pooling.
        total = sum(
            (images[:, y::factor, x::factor].astype(np.uint16) for y in range(factor) for x in range(factor)),
            np.full((), factor * factor // 2, np.uint16),
        )
        small = (total // np.uint16(factor * factor)).astype(np.uint8)
    else:
        small = _pool(images)
    return np.ascontiguousarray(np.repeat(small, 3, -1) if channels == 1 else small)


def _pool(images: Pixels) -> Pixels:
    """Average images of any size over the areas of 32×32 cells."""
    import torch
    from torch.nn import functional

    pieces = [np.zeros((0, SIDE, SIDE, images.shape[-1]), np.uint8)]
    for start in range(0, len(images), 1024):
        planes = torch.from_numpy(np.ascontiguousarray(images[start : start + 1024])).permute(0, 3, 1, 2).float()
        pooled = functional.adaptive_avg_pool2d(planes, SIDE).add(0.5).to(torch.uint8)
        pieces.append(pooled.permute(0, 2, 3, 1).numpy())
    return np.concatenate(pieces)
