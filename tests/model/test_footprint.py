"""What networks cost: counted by hand, and as the docs say."""

import re

import pytest
from support import ROOT

from pipeline.config import NetworkConfig
from pipeline.model.footprint import at_most, footprint
from pipeline.model.networks import build_discriminator, build_generator


@pytest.mark.parametrize("settings", [{}, {"architecture": "residual"}, {"image_size": "64x96", "channels": 4}])
def test_parameters_are_those_of_the_networks(settings: dict[str, object]) -> None:
    config = NetworkConfig.model_validate({"width": 8, **settings})
    found = footprint(config)
    for network, cost in (
        (build_generator(config), found.generator),
        (build_discriminator(config), found.discriminator),
    ):
        assert cost.parameters == sum(weight.numel() for weight in network.parameters())


def test_operations_and_maps_are_those_counted_by_hand() -> None:
    found = footprint(NetworkConfig(image_size=16, channels=1, width=4, latent_dim=10))
    # z -> 8 x 4x4 -> 4 x 8x8 -> 1 x 16x16, kernels of 4x4; a transposed convolution multiplies at each input.
    assert found.generator.operations == 2 * 16 * (10 * 8 + 16 * 8 * 4 + 64 * 4 * 1)
    # 16x16 -> 4 x 8x8 -> 8 x 4x4 -> 1; a convolution at each output.
    assert found.discriminator.operations == 2 * 16 * (64 * 4 + 16 * 4 * 8 + 8)
    # The image, the first maps, and the second ones before and after BatchNorm, whose mean and deviation are 2 x 8.
    assert found.discriminator.kept_bytes == 4 * (256 + 4 * 64 + 2 * 8 * 16 + 2 * 8)
    assert found.update_bytes(8) == found.state_bytes + 8 * (
        found.generator.kept_bytes + 2 * found.discriminator.kept_bytes
    )
    assert found.update_bytes(8, apart=True) < found.update_bytes(8)
    of_g, of_d = found.generator.operations, found.discriminator.operations
    assert found.update_operations() == 3 * of_g + 8 * of_d
    # G's turn: all of G, D forward and by its input. D's: G forward, all of D on real and fake.
    assert 2 * found.update_operations(alternate=True) == (3 * of_g + 2 * of_d) + (of_g + 6 * of_d)


@pytest.mark.parametrize("architecture", ["dcgan", "residual"])
@pytest.mark.parametrize(("size", "width"), [(16, 4), (28, 128), ("96x64", 32), (256, 16), (512, 128)])
def test_the_quick_estimate_is_above_the_exact_one(architecture: str, size: int | str, width: int) -> None:
    config = NetworkConfig.model_validate({"architecture": architecture, "image_size": size, "width": width})
    for images in (1, 64):
        assert footprint(config).update_bytes(images) < at_most(config, images)


def test_a_label_changes_nothing() -> None:
    assert footprint(NetworkConfig(width=4, label=("kind",))) == footprint(NetworkConfig(width=4))


def test_the_table_of_the_docs_is_right() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    rows = re.findall(
        r"^\| (\d+(?:x\d+)?) \| ([\d.]+) M \| ([\d.]+) M \| ([\d.]+) GFLOP \| ([\d.]+) GB \| ([\d.]+) MB \|", text, re.M
    )
    assert len(rows) >= 8
    for size, generator, discriminator, operations, state, image in rows:
        found = footprint(NetworkConfig.model_validate({"image_size": size}))
        assert generator == f"{found.generator.parameters / 1e6:.1f}"
        assert discriminator == f"{found.discriminator.parameters / 1e6:.1f}"
        assert operations == f"{found.generator.operations / 1e9:.3g}"
        assert state == f"{found.state_bytes / 1e9:.2f}"
        assert image == f"{found.image_bytes() / 1e6:.1f}"
