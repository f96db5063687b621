"""The whole family has the paper's shapes, weights and layers."""

import itertools

import pytest
import torch
from torch import nn

from pipeline.common.errors import ConfigConflict
from pipeline.config import NetworkConfig
from pipeline.model.dcgan import stage_widths
from pipeline.model.networks import build_discriminator, build_generator, initialize

FAMILY = [
    NetworkConfig(
        image_size=size, channels=channels, width=4, kernel_size=kernel, upsampling=up, head=head, latent_dim=6
    )
    for size, channels, kernel, up, head in itertools.product(
        (32, 64, 128, 28, "96x64"), (1, 3), (4, 5), ("transposed", "bilinear"), ("convolution", "average")
    )
]


@pytest.mark.parametrize("config", FAMILY)
def test_shapes_and_ranges(config: NetworkConfig) -> None:
    images = build_generator(config)(torch.rand(2, 6) * 2 - 1)
    height, width, channels = config.image_shape
    assert images.shape == (2, channels, height, width)
    assert images.abs().max() <= 1
    assert build_discriminator(config)(images).shape == (2,)


def test_the_first_maps_have_the_proportion_of_the_image() -> None:
    config = NetworkConfig(image_size="96x64", channels=4, width=4)
    generator, discriminator = build_generator(config), build_discriminator(config)
    assert generator.state_dict()["layers.0.weight"].shape[2:] == (4, 6)
    assert discriminator.state_dict()["head.weight"].shape[2:] == (4, 6)
    assert stage_widths(config) == stage_widths(NetworkConfig(width=4))  # four doublings, as at 64


def test_no_more_than_the_papers_1024_channels_at_256_and_512() -> None:
    assert stage_widths(NetworkConfig(image_size=128)) == [2048, 1024, 512, 256, 128]
    assert stage_widths(NetworkConfig(image_size=256)) == [1024, 1024, 1024, 512, 256, 128]
    assert stage_widths(NetworkConfig(image_size=512, width=32)) == [256, 256, 256, 256, 128, 64, 32]


def test_parameter_counts_of_the_tutorial_and_the_paper() -> None:
    def count(network: nn.Module) -> int:
        return sum(weight.numel() for weight in network.parameters())

    # pytorch/examples' DCGAN at ngf = ndf = 64: 3,576,704 and 2,765,568 parameters.
    tutorial = NetworkConfig(width=64)
    assert (count(build_generator(tutorial)), count(build_discriminator(tutorial))) == (3_576_704, 2_765_568)
    paper = NetworkConfig(width=128)
    assert [round(count(net(paper)) / 1e6, 1) for net in (build_generator, build_discriminator)] == [12.7, 11.0]


def test_normalization_is_where_the_paper_has_it() -> None:
    config = NetworkConfig(width=8)
    generator, discriminator = (
        [module for module in build(config).modules() if not any(module.children())]
        for build in (build_generator, build_discriminator)
    )
    assert isinstance(generator[-1], nn.Tanh)
    assert isinstance(generator[-2], nn.ConvTranspose2d)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in generator) == 4
    assert isinstance(discriminator[1], nn.LeakyReLU)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in discriminator) == 3


def test_initial_weights_follow_the_paper_and_the_seed() -> None:
    config = NetworkConfig(width=32)
    first, again, other = build_generator(config), build_generator(config), build_generator(config)
    initialize(first, 5, lane=0)
    initialize(again, 5, lane=0)
    initialize(other, 6, lane=0)
    state, same, different = first.state_dict(), again.state_dict(), other.state_dict()
    assert all(torch.equal(state[key], same[key]) for key in state)
    assert not torch.equal(state["layers.0.weight"], different["layers.0.weight"])
    weight = state["layers.0.weight"]
    assert abs(weight.mean()) < 1e-3
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    scales = torch.cat([state[f"layers.{layer}.weight"] for layer in (1, 4, 7, 10)])
    assert scales.mean().item() == pytest.approx(1, abs=0.01)
    assert scales.std().item() == pytest.approx(0.02, rel=0.2)


def test_initial_shifts_are_zero_whatever_was_there() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ConvTranspose2d(2, 1, 3))
    for parameter in network.parameters():
        nn.init.ones_(parameter)
    initialize(network, 0, lane=0)
    assert not any(value.any() for name, value in network.state_dict().items() if name.endswith("bias"))


@pytest.mark.parametrize("size", [64, "96x64"])
def test_batchnorm_of_each_unit_is_that_of_a_linear_layer_before_its_maps_are_shaped(size: int | str) -> None:
    config = NetworkConfig(image_size=size, width=4, latent_dim=6, first_batchnorm="unit")
    generator, z = build_generator(config).double(), torch.rand(8, 6, dtype=torch.float64) * 2 - 1
    initialize(generator, 0, lane=0)
    height, width = config.stages[1:]
    weight, scale = (generator.state_dict()[f"layers.{layer}.weight"] for layer in (0, 1))
    assert weight.shape == (6, 32 * height * width, 1, 1)
    units = z @ weight[:, :, 0, 0]
    deviation = (units.var(0, correction=0) + 1e-5).sqrt()
    expected = ((units - units.mean(0)) / deviation * scale).relu().view(8, 32, height, width)
    torch.testing.assert_close(generator.feature_maps(z, 4), expected)


def test_batchnorm_of_each_unit_is_folded_into_one_bias_for_each() -> None:
    config = NetworkConfig(width=4, latent_dim=6, first_batchnorm="unit")
    generator, z = build_generator(config), torch.rand(64, 6) * 2 - 1
    generator(z)
    folded = generator.eval().folded()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(z), generator(z), atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigConflict, match=r"first_batchnorm=unit: .*leave network\.first_batchnorm out"):
        build_generator(config.model_copy(update={"architecture": "residual"}))
