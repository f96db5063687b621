"""The analyses use the interface of the networks only: they work on networks that share nothing with the paper's."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from planted import NETWORK, planted
from torch import Tensor, nn

from pipeline.evaluation.paper.discriminator_features import features, measure_batchnorm, random_discriminator
from pipeline.evaluation.paper.features import ascend, guided_backpropagation, peak_responses
from pipeline.evaluation.paper.forget import Box, object_maps, without_maps
from pipeline.evaluation.paper.walks import draw
from pipeline.model import networks
from pipeline.model.sampling import images_of


class ColorGenerator(networks.Generator):
    """One color an image, from a single map of 8x8; no Sequential, no BatchNorm, no transposed convolution."""

    def __init__(self) -> None:
        super().__init__(NETWORK)
        self.linear = nn.Linear(NETWORK.latent_dim, 3 * 8 * 8)
        self.active = nn.SiLU()
        self.color = nn.Conv2d(3, 3, 1)

    @property
    def last_activation(self) -> nn.Module:
        return self.active

    def forward(self, z: Tensor) -> Tensor:
        return F.interpolate(self.color(self.active(self.linear(z).view(-1, 3, 8, 8))), scale_factor=4).tanh()


class TwoLayers(networks.Discriminator):
    """Two layers of 5 and 7 channels that are summed over, without a head and without BatchNorm."""

    def __init__(self) -> None:
        super().__init__(NETWORK)
        self.first, self.second = nn.Conv2d(3, 5, 3, 3), nn.Conv2d(5, 7, 3, 3)
        self.active = nn.ReLU()

    @property
    def activation_widths(self) -> list[int]:
        return [5, 7]

    def activations(self, images: Tensor) -> Iterator[Tensor]:
        fine = self.active(self.first(images))
        yield fine
        yield self.active(self.second(fine))

    def forward(self, images: Tensor) -> Tensor:
        *_, coarse = self.activations(images)
        return coarse.sum((1, 2, 3))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_features_of_any_discriminator() -> None:
    network = measure_batchnorm(TwoLayers(), planted(65, seed=0)[0]).requires_grad_(False)
    images, _ = planted(3, seed=1)
    assert features(network, images).shape == (3, 16 * sum(network.activation_widths))
    for layer, width in enumerate(network.activation_widths, start=1):
        peaks = peak_responses(network, images, layer)
        assert peaks.shape == (3, width)
        unit = int(peaks.max(0).argmax())
        shown = guided_backpropagation(network, images, layer, unit).astype(int) - 128
        assert np.abs(shown).max() == pytest.approx(127, abs=1)
        assert ascend(network, layer, unit, images.shape[1:], seed=0).shape == (1, 32, 32, 3)


def test_features_of_a_spectral_discriminator_are_its_own_and_change_nothing() -> None:
    network = random_discriminator(NETWORK.model_copy(update={"discriminator_norm": "spectral"}), seed=0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images, _ = planted(65, seed=0)
    found = features(measure_batchnorm(network, images), images)
    assert found.shape == (65, 16 * sum(network.activation_widths))
    np.testing.assert_array_equal(features(network, images), found)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_forgetting_with_any_generator() -> None:
    generator = ColorGenerator().eval().requires_grad_(False)
    weights, _ = object_maps(generator, [Box(index, 8, 8, 24, 24) for index in range(10)], seed=0)
    assert weights.shape == (3,)
    z = draw(NETWORK, 0, 0, 4)
    np.testing.assert_array_equal(without_maps(generator, np.arange(3), z, strength=0.0), images_of(generator, z))
    empty = without_maps(generator, np.arange(3), z)
    np.testing.assert_array_equal(empty, np.broadcast_to(empty[:1, :1, :1], empty.shape))  # the bias's color
