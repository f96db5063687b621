"""`dcgan-eval features`: what excites D's units, by guided backpropagation and by gradient ascent (Figure 5)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.common.errors import UsageError
from pipeline.evaluation import charts, inputs
from pipeline.evaluation.classifier import to_network
from pipeline.evaluation.images import Pixels
from pipeline.evaluation.inputs import device
from pipeline.evaluation.paper.discriminator_features import (
    random_discriminator,
    reestimate_batchnorm,
)
from pipeline.evaluation.paper.nearest import gather
from pipeline.evaluation.results import Result
from pipeline.model.networks import Discriminator
from pipeline.model.sampling import to_uint8

Peaks = NDArray[np.float32]

SEARCHED = 2_048
ASCENT_STEPS = 160
SMOOTHNESS = 0.02
JITTER = 2


def run_features(
    out: Path, *, ckpt: str, data: str, layer: int | None, units: int, images_each: int, seed: int
) -> dict[str, float]:
    """Write features.json and pictures of a layer's strongest units, trained beside random weights.

    `layer` counts from 1; None is the last.
    """
    loaded, subject = inputs.discriminator(ckpt)
    widths = loaded.discriminator.activation_widths
    layer = len(widths) if layer is None else layer
    if not 1 <= layer <= len(widths):
        raise UsageError(f"--layer {layer}: the discriminator has layers 1 to {len(widths)}")
    reals, description = inputs.reals(data, SEARCHED)
    inputs.check_fits(loaded.config, reals.shape)
    images = gather(reals, "reading real images")
    settings = {"layer": layer, "units": units, "images_each": images_each, "seed": seed}
    result = Result("features", out, subject, description, settings)
    networks = {"trained": loaded.discriminator, "random weights": random_discriminator(loaded.config, seed)}
    selectivity = {}
    for name, network in networks.items():
        reestimate_batchnorm(network, images)
        peaks = peak_responses(network, images, layer)
        chosen, strength = strongest(peaks, units)
        selectivity[name] = float(strength.mean())
        groups = []
        for unit in chosen:
            best = np.argsort(-peaks[:, unit])[:images_each]
            groups.append((f"unit {unit}: the images that excite it most", images[best]))
            groups.append(("and what in them does", guided_backpropagation(network, images[best], layer, unit)))
        slug = name.replace(" ", "-")
        result.picture(charts.sheet(groups, images_each), f"Layer {layer}, {name}: guided backpropagation", f"-{slug}")
        preferred = np.concatenate([ascend(network, layer, unit, images.shape[1:], seed) for unit in chosen])
        caption = f"Layer {layer}, {name}: images made to excite each of these units"
        result.picture(charts.sheet([("", preferred)], units), caption, f"-ascent-{slug}")
    result.write(
        {f"selectivity_{name.replace(' ', '_')}": value for name, value in selectivity.items()},
        summary=(
            f"The {units} most selective of the {widths[layer - 1]} units in the discriminator's convolution {layer}: "
            f"their strongest response lies {selectivity['trained']:.1f} deviations above their mean response over "
            f"{len(images):,} real images, with random weights {selectivity['random weights']:.1f}."
        ),
        note="Guided backpropagation lets only positive gradients pass through units that are on (Springenberg 2014).",
    )
    return selectivity


@torch.no_grad()
def peak_responses(network: Discriminator, images: Pixels, layer: int) -> Peaks:
    """Return each unit's largest response anywhere in each image: (N, units)."""
    rows = []
    for start in range(0, len(images), 256):
        maps = next(islice(network.activations(to_network(images[start : start + 256])), layer - 1, None))
        rows.append(maps.amax((2, 3)).cpu())
    return np.asarray(torch.cat(rows).numpy(), np.float32)


def strongest(peaks: Peaks, units: int) -> tuple[list[int], NDArray[np.float32]]:
    """Return the units whose best images stand out most from the rest, and by how many deviations."""
    best = np.sort(peaks, axis=0)[-8:].mean(0)
    strength = (best - peaks.mean(0)) / np.maximum(peaks.std(0), 1e-6)
    order = np.argsort(-strength)[:units]
    return [int(unit) for unit in order], np.asarray(strength[order], np.float32)


class _Guided(torch.autograd.Function):
    """A rectifier whose gradient passes only where the unit is on and the gradient is positive."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(values)
        return F.leaky_relu(values, slope)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (values,) = ctx.saved_tensors
        passed: Tensor = gradients[0].clamp(min=0) * (values > 0)
        return passed, None


def _rectify(values: Tensor, slope: float) -> Tensor:
    guided: Tensor = _Guided.apply(values, slope)  # type: ignore[no-untyped-call]
    return guided


@contextmanager
def _guided(network: nn.Module) -> Iterator[None]:
    """Let every rectifier of a network pass gradients as guided backpropagation does."""
    rectifiers = [module for module in network.modules() if isinstance(module, nn.LeakyReLU | nn.ReLU)]
    for module in rectifiers:
        slope = module.negative_slope if isinstance(module, nn.LeakyReLU) else 0.0
        module.forward = partial(_rectify, slope=slope)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in rectifiers:
            del module.forward


def guided_backpropagation(network: Discriminator, images: Pixels, layer: int, unit: int) -> Pixels:
    """Return what in each image excites `unit` of convolution `layer`, as pictures around middle gray."""
    x = to_network(images).requires_grad_(True)
    with _guided(network):
        maps = next(islice(network.activations(x), layer - 1, None))
        (gradient,) = torch.autograd.grad(maps[:, unit].amax((1, 2)).sum(), x)
    scale = gradient.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    return _to_pixels(gradient / scale)


def ascend(network: Discriminator, layer: int, unit: int, shape: tuple[int, ...], seed: int) -> Pixels:
    """Return an image (1, H, W, C) made by gradient ascent on the mean response of `unit`, kept smooth."""
    height, width, channels = shape
    generator = torch.Generator().manual_seed(seed)
    start = 0.1 * torch.randn(1, channels, height, width, generator=generator)
    x = start.to(device()).requires_grad_(True)
    optimizer = torch.optim.Adam([x], 0.05)
    for _ in range(ASCENT_STEPS):
        shift = torch.randint(-JITTER, JITTER + 1, (2,), generator=generator).tolist()
        maps = next(islice(network.activations(torch.roll(x.clamp(-1, 1), shift, (2, 3))), layer - 1, None))
        roughness = x.diff(dim=2).square().mean() + x.diff(dim=3).square().mean()
        loss = -maps[:, unit].mean() + SMOOTHNESS * (roughness * 100 + x.square().mean())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return _to_pixels(x.detach())


def _to_pixels(values: Tensor) -> Pixels:
    """float (N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C)."""
    return np.asarray(to_uint8(values).cpu().numpy())
