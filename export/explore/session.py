"""What the page computes: samples by seed, walks between them, sums of them, each with the z that makes it again."""

import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from export.samplers.base import Sampler
from pipeline.common.imaging import Pixels, encode, grid
from pipeline.common.randomness import Purpose
from pipeline.evaluation.animation import animate
from pipeline.evaluation.paper.walks import NOISE, Z, spherical
from pipeline.model.latents import latents

COLUMNS, ROWS = 8, 4
STRIP = 12
"""Images of a walk in a row."""
FRAMES_PER_SECOND = 12
GAP = 2
NEIGHBORS = 8
"""Images around a sum, as in Figure 7 of the paper."""

Kind = Literal["grid", "walk", "sum"]


@dataclass(frozen=True)
class Shown:
    """Images and what made them."""

    kind: Kind
    z: Z
    """float32 (images, latent_dim), as the model got them: `dcgan-generate --latents` takes them back."""
    images: Pixels
    """uint8 (images, height, width, channels)."""
    label: str | None = None

    def png(self) -> bytes:
        """Return all images as one sheet."""
        columns = {"grid": COLUMNS, "walk": STRIP, "sum": len(self.images)}[self.kind]
        return encode(grid(self.images, min(columns, len(self.images)), gap=GAP), "png")

    def npy(self) -> bytes:
        """Return z as a .npy file."""
        buffer = io.BytesIO()
        np.save(buffer, self.z)
        return buffer.getvalue()

    def webp(self, scale: int = 4) -> bytes:
        """Return the images one after the other, there and back, as an animation."""
        frames = [frame.repeat(scale, 0).repeat(scale, 1) for frame in (*self.images, *self.images[-2:0:-1])]
        return animate(frames, "webp", [1 / FRAMES_PER_SECOND] * len(frames))

    def write(self, folder: Path) -> list[Path]:
        """Write the sheet, z, and of a walk the animation, for a browser to fetch; return their paths."""
        parts = {f"{self.kind}.png": self.png(), f"{self.kind}.npy": self.npy()}
        if self.kind == "walk":
            parts["walk.webp"] = self.webp()
        place = Path(tempfile.mkdtemp(dir=folder))
        for name, data in parts.items():
            (place / name).write_bytes(data)
        return [place / name for name in parts]


class Session:
    """A model, asked for pictures. All that it shows is a pure function of the model and of the arguments."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.network = sampler.network

    def grid(self, seed: int, start: int, truncation: float = 1.0, label: str | None = None) -> Shown:
        """Return samples `start` and those that follow of a seed: at 1, those of dcgan-generate with this seed.

        `truncation` is a factor on z. Below 1 samples are more typical and more alike: z near 0 were seen most often.
        """
        network = self.network
        count = ROWS * COLUMNS
        z = latents(seed, Purpose.SAMPLE, start, count, network.latent_dim, network.latent_distribution)
        return self._show("grid", z * np.float32(truncation), label)

    def walk(self, ends: Sequence[Z], steps: int, label: str | None = None) -> Shown:
        """Return `steps` images along the sphere from one z (latent_dim) to the other."""
        return self._show("walk", spherical(ends[0], ends[1], steps), label)

    def sum(self, plus: Sequence[Z], minus: Sequence[Z], more: Sequence[Z], label: str | None = None) -> Shown:
        """Return mean(plus) - mean(minus) + mean(more), and neighbors of it (section 6.3.2, Figure 7).

        Averaging three exemplars of each, as the paper does, is what makes it work. Empty terms count as nothing.
        """
        z = np.zeros(self.network.latent_dim, np.float32)
        for sign, terms in ((1, plus), (-1, minus), (1, more)):
            if len(terms):
                z += np.float32(sign) * np.mean(terms, axis=0, dtype=np.float32)
        noise = np.random.default_rng(0).uniform(-NOISE, NOISE, (NEIGHBORS, len(z))).astype(np.float32)
        return self._show("sum", np.concatenate([z[None], z + noise]), label)

    def _show(self, kind: Kind, z: Z, label: str | None) -> Shown:
        return Shown(kind, z, self.sampler.sample(z, label), label)
