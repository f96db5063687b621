"""The residual networks offer all that the rest of the product asks of a network."""

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.common.errors import ConfigConflict
from pipeline.config import NetworkConfig
from pipeline.model import residual
from pipeline.model.networks import build_discriminator, build_generator, initialize


def config(size: int | str = 32, **settings: Any) -> NetworkConfig:
    return NetworkConfig.model_validate(
        {"architecture": "residual", "image_size": size, "width": 4, "latent_dim": 6, **settings}
    )


@pytest.mark.parametrize("size", [32, 64, 128, "64x96"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("head", ["convolution", "average"])
def test_shapes(size: int | str, channels: int, head: str) -> None:
    settings = config(size, channels=channels, head=head)
    generator, discriminator = build_generator(settings), build_discriminator(settings)
    assert isinstance(generator, residual.Generator)
    images = generator(torch.rand(2, 6) * 2 - 1)
    height, width, _ = settings.image_shape
    assert images.shape == (2, channels, height, width)
    assert images.abs().max() <= 1
    assert discriminator(images).shape == (2,)
    maps = list(discriminator.activations(images))
    assert [found.shape[1] for found in maps] == discriminator.activation_widths
    assert [found.shape[2] for found in maps] == [height >> stage for stage in range(1, len(maps) + 1)]
    assert isinstance(discriminator, residual.Discriminator)
    torch.testing.assert_close(discriminator.head(maps[-1]).flatten(), discriminator(images))


def test_folding_keeps_the_images_and_removes_what_it_can() -> None:
    generator = build_generator(config())
    initialize(generator, 0, lane=0)
    for _ in range(20):
        generator(torch.randn(16, 6))  # statistics that are not 0 and 1
    generator.eval()
    z = torch.randn(4, 6)
    folded = generator.folded()
    torch.testing.assert_close(folded(z), generator(z), rtol=1e-4, atol=1e-5)

    def norms(network: nn.Module) -> int:
        return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())

    assert (norms(generator), norms(folded)) == (7, 4)  # those that follow a sum have no convolution to go into


def test_maps_are_read_and_dropped_before_the_last_convolution() -> None:
    generator = build_generator(config()).eval()
    z = torch.randn(3, 6)
    before = generator(z)
    maps = generator.feature_maps(z)
    assert maps.shape == (3, 4, 32, 32)
    assert isinstance(generator, residual.Generator)
    torch.testing.assert_close(generator.to_image(maps), before)
    everything = torch.arange(4)
    torch.testing.assert_close(generator.without_maps(z, everything), torch.zeros_like(before))
    torch.testing.assert_close(generator(z), before)
    second = generator.feature_maps(z, 2)
    assert second.shape == (3, 4, 16, 16)
    torch.testing.assert_close(generator.to_image(generator.normalize(generator.blocks[-1](second))), before)


@pytest.mark.parametrize(
    "setting", [{"kernel_size": 5}, {"upsampling": "bilinear"}, {"discriminator_norm": "spectral"}]
)
def test_a_setting_that_would_be_ignored_is_refused(setting: dict[str, Any]) -> None:
    (name,) = setting
    for build in (build_generator, build_discriminator):
        with pytest.raises(ConfigConflict, match=f"network.{name}="):
            build(config(**setting))
