"""`dcgan-eval features`: what excites the units of D, by guided backpropagation and gradient ascent (Figure 5)."""

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
from pipeline.common.imaging import Pixels
from pipeline.evaluation import charts, inputs
from pipeline.evaluation.device import device, to_network
from pipeline.evaluation.nearest.nearest import gather
from pipeline.evaluation.paper.discriminator_features import measure_batchnorm, random_discriminator
from pipeline.evaluation.results import Result
from pipeline.model.networks import Discriminator
from pipeline.model.sampling import to_uint8

Peaks = NDArray[np.float32]

SEARCHED = 2_048
"""Real images among which the ones that excite a unit are looked for."""
ASCENT_STEPS = 160
SMOOTHNESS = 0.02
"""Weight of the penalty on rough images in gradient ascent."""
JITTER = 2
"""Pixels by which the image is shifted at random before each ascent step."""


def run_features(
    out: Path, *, ckpt: str, data: str, layer: int | None, units: int, images_each: int, seed: int
) -> dict[str, float]:
    """Write features.json and pictures of a layer's most selective units, with trained and with random weights.

    `layer` is one of the discriminator's `activations`, counted from 1; None is the last. Returns the selectivity of
    both. Raises UsageError when there is no such layer.
    """
    loaded, subject = inputs.discriminator(ckpt)
    widths = loaded.discriminator.activation_widths
    layer = len(widths) if layer is None else layer
    if not 1 <= layer <= len(widths):
        raise UsageError(f"--layer {layer}: the discriminator has layers 1 to {len(widths)}")
    reals, description = inputs.reals(data, SEARCHED, inputs.shape_of(loaded.config))
    inputs.check_fits(loaded.config, reals.shape)
    images = gather(reals, "reading real images")
    settings = {"layer": layer, "units": units, "images_each": images_each, "seed": seed}
    result = Result("features", out, subject, description, settings)
    networks = {"trained": loaded.discriminator, "random weights": random_discriminator(loaded.config, seed)}
    selectivity = {}
    for name, network in networks.items():
        measure_batchnorm(network, images)
        peaks = peak_responses(network, images, layer)
        chosen, strength = most_selective(peaks, units)
        selectivity[name] = float(strength.mean())
        groups = []
        for unit in chosen:
            best = np.argsort(-peaks[:, unit])[:images_each]
            groups.append((f"unit {unit}: the images that excite it most", images[best]))
            groups.append(("and the parts that excite it", guided_backpropagation(network, images[best], layer, unit)))
        slug = name.replace(" ", "-")
        result.picture(charts.sheet(groups, images_each), f"Layer {layer}, {name}: guided backpropagation", f"-{slug}")
        preferred = np.concatenate([ascend(network, layer, unit, images.shape[1:], seed) for unit in chosen])
        caption = f"Layer {layer}, {name}: images made to excite each of these units"
        result.picture(charts.sheet([("", preferred)], units), caption, f"-ascent-{slug}")
    result.write(
        {f"selectivity_{name.replace(' ', '_')}": value for name, value in selectivity.items()},
        summary=(
            f"The {units} most selective of the {widths[layer - 1]} units in layer {layer} of the discriminator: over "
            f"{len(images):,} real images their strongest response lies {selectivity['trained']:.1f} deviations above "
            f"their mean response, with random weights {selectivity['random weights']:.1f}."
        ),
        note="Guided backpropagation passes positive gradients only, at units that are on (Springenberg et al. 2014).",
    )
    return selectivity


@torch.no_grad()
def peak_responses(network: Discriminator, images: Pixels, layer: int) -> Peaks:
    """Return each unit's largest response anywhere in each image: (N, units)."""
    rows = []
    for start in range(0, len(images), 256):
        maps = _maps(network, to_network(images[start : start + 256]), layer)
        rows.append(maps.amax((2, 3)).cpu())
    return np.asarray(torch.cat(rows).numpy(), np.float32)


def most_selective(peaks: Peaks, units: int) -> tuple[list[int], NDArray[np.float32]]:
    """Return the units whose best images stand out most from the rest, and by how many deviations they do."""
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
    """Make every rectifier of a network pass gradients as guided backpropagation does.

    It finds nn.ReLU and nn.LeakyReLU modules; any other nonlinearity passes its plain gradient.
    """
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
    """Return which parts of each image excite `unit` of `layer`, as pictures around middle gray: uint8 (N, H, W, C)."""
    x = to_network(images).requires_grad_(True)
    with _guided(network):
        maps = _maps(network, x, layer)
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
        maps = _maps(network, torch.roll(x.clamp(-1, 1), shift, (2, 3)), layer)
        roughness = x.diff(dim=2).square().mean() + x.diff(dim=3).square().mean()
        loss = -maps[:, unit].mean() + SMOOTHNESS * (roughness * 100 + x.square().mean())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return _to_pixels(x.detach())


def _maps(network: Discriminator, images: Tensor, layer: int) -> Tensor:
    """Return the activations of `layer`, counted from 1; later layers are not computed."""
    return next(islice(network.activations(images), layer - 1, None))


def _to_pixels(values: Tensor) -> Pixels:
    """float (N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C)."""
    return np.asarray(to_uint8(values).cpu().numpy())
