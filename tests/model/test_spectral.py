"""Spectral normalization of D equals singular values in float64, and leaves G and the other networks as they are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import NetworkConfig
from pipeline.model.footprint import footprint
from pipeline.model.networks import build_discriminator, build_generator, initialize
from pipeline.model.spectral import Spectral, SpectralConv2d, SpectralLinear
from pipeline.training.update.weights import lowered


def network(**settings: Any) -> NetworkConfig:
    values = {"image_size": 32, "width": 4, "latent_dim": 6, "discriminator_norm": "spectral", **settings}
    return NetworkConfig.model_validate(values)


def singular(weight: Tensor) -> Tensor:
    """Return the singular values of a weight, the largest first, of float64."""
    values: Tensor = torch.linalg.svdvals(weight.detach().double().flatten(1))
    return values


LABEL = {"label": "digit", "classes": ["0", "1", "2"], "class_images": [5, 1, 4]}
FAMILY = [
    network(),
    network(image_size=28, channels=1, kernel_size=5, bias=True),
    network(image_size="96x64", head="average"),
    network(**LABEL),
    network(conditioning="concat", **LABEL),
]


@pytest.mark.parametrize("config", FAMILY)
def test_all_weights_of_the_discriminator_have_a_norm_of_one(config: NetworkConfig) -> None:
    """After enough iterations; the estimate after the first is below, never above."""
    discriminator = build_discriminator(config)
    initialize(discriminator, 3, lane=1)
    kinds = [type(layer) for layer in discriminator.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert {*kinds} <= {SpectralConv2d, SpectralLinear}
    assert (SpectralLinear in kinds) == (bool(config.label) and config.conditioning == "projection")
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in discriminator.modules())
    for layer in discriminator.modules():
        if isinstance(layer, Spectral):
            assert 1 <= singular(layer.normalized())[0] * (1 + 1e-6) < 1.3
            for _ in range(300):
                layer.iterate()
            assert singular(layer.normalized())[0].item() == pytest.approx(1, abs=1e-3)
            assert layer.u.norm().item() == pytest.approx(1, abs=1e-6)


def test_its_gradient_is_the_papers_in_float64() -> None:
    """Equation 12, by the exact singular vectors: (G - <G, W / sigma> u v^T) / sigma."""
    layer = SpectralLinear(7, 5, bias=False).double()
    for _ in range(2000):
        layer.iterate()
    upstream = torch.randn(5, 7, dtype=torch.float64)
    (layer.normalized() * upstream).sum().backward()  # type: ignore[no-untyped-call]
    left, values, right = torch.linalg.svd(layer.weight.detach())
    sigma, outer = values[0], torch.outer(left[:, 0], right[0])
    expected = (upstream - (upstream * layer.weight.detach() / sigma).sum() * outer) / sigma
    torch.testing.assert_close(layer.weight.grad, expected, rtol=0, atol=1e-9)


def test_an_update_in_bf16_normalizes_in_float32() -> None:
    discriminator = build_discriminator(network())
    initialize(discriminator, 3, lane=1)
    passes = lowered(discriminator, torch.bfloat16)
    for layer, used in zip(discriminator.modules(), passes.modules(), strict=True):
        if isinstance(layer, Spectral):
            assert used is layer
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(layer.normalized(), layer.normalized())
                assert layer.normalized().dtype == torch.float32
                inside = layer.normalized()
            assert torch.equal(inside, layer.normalized())


def test_passes_leave_the_estimate_alone_and_it_follows_from_the_seed() -> None:
    first, again = (build_discriminator(network()) for _ in range(2))
    initialize(first, 3, lane=1)
    initialize(again, 3, lane=1)
    before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    for mode in (True, False):
        first.train(mode)(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(before[name], tensor) for name, tensor in first.state_dict().items())
    assert all(torch.equal(before[name], tensor) for name, tensor in again.state_dict().items())
    assert "layers.0.u" in before


def test_the_generator_is_the_same_and_the_discriminator_has_the_same_stages() -> None:
    plain, config = network(discriminator_norm="batch"), network()
    assert "discriminator_norm" not in plain.model_dump(), "files of networks without it are as before"
    states = []
    for one in (plain, config):
        generator = build_generator(one)
        initialize(generator, 0, lane=0)
        states.append(generator.state_dict())
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    discriminators = [build_discriminator(one) for one in (plain, config)]
    assert len({len(one.stages) for one in discriminators}) == 1
    images = torch.randn(2, 3, 32, 32)
    maps = [[found.shape for found in one.activations(images)] for one in discriminators]
    assert maps[0] == maps[1]


def test_a_normalized_weight_is_not_counted_for_each_image() -> None:
    found, plain = (
        footprint(network(image_size=16, channels=1, discriminator_norm=norm)).discriminator
        for norm in ("spectral", "batch")
    )
    # 16x16 -> 4 x 8x8 -> 8 x 4x4 -> 1: the image and both maps; of each layer W^T u, (inputs, 4, 4), and sigma.
    assert found.kept_bytes == 4 * (256 + 4 * 64 + 8 * 16 + 16 * (1 + 4 + 8) + 3)
    assert found.operations == plain.operations
    assert found.parameters == plain.parameters - 8, "a shift of each of 8 maps, and no scale"
