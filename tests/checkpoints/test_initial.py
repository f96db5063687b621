"""What a run takes over from the weights of others: layers of equal shape, whole, and nothing else."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.checkpoints.initial import describe, fill, fitting, read_initial, sentences
from pipeline.checkpoints.weights import serialize
from pipeline.common.errors import ConfigConflict, DataError, UsageError
from pipeline.config import NetworkConfig
from pipeline.model.networks import build_discriminator, build_generator, initialize

SMALL = NetworkConfig(image_size=32, width=4, latent_dim=6)


def networks(config: NetworkConfig, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    generator, discriminator = build_generator(config), build_discriminator(config)
    initialize(generator, seed, lane=0)
    initialize(discriminator, seed, lane=1)
    return generator, discriminator


def new_layers(network: nn.Module, source: nn.Module) -> list[str]:
    return describe(network, fitting(network, source.state_dict()))[1]


@pytest.mark.parametrize(
    ("changes", "new_g", "new_d"),
    [
        ({}, [], []),
        ({"channels": 1}, ["layers.9"], ["layers.0"]),
        ({"latent_dim": 7}, ["layers.0"], []),
        ({"head": "average"}, [], ["head.1"]),
        # Half the width at twice the size has the same maps at 4x4: counted from there in both networks.
        ({"image_size": 64, "width": 2}, ["layers.9", "layers.10", "layers.12"], ["layers.0", "layers.2", "layers.3"]),
        # The same width at twice the size has the same maps at the image.
        ({"image_size": 64}, ["layers.0", "layers.1", "layers.3"], ["layers.8", "layers.9", "head"]),
    ],
    ids=str,
)
def test_layers_of_equal_shape_are_taken(changes: dict[str, object], new_g: list[str], new_d: list[str]) -> None:
    source = networks(NetworkConfig.model_construct(**{**SMALL.model_dump(), "width": 4}))
    found = networks(NetworkConfig.model_construct(**{**SMALL.model_dump(), **changes}), seed=1)
    assert [new_layers(*pair) for pair in zip(found, source, strict=True)] == [new_g, new_d]


def test_a_larger_discriminator_has_the_layers_of_the_same_maps() -> None:
    source = networks(SMALL)[1].state_dict()
    found = fitting(networks(SMALL.model_copy(update={"image_size": 64}), seed=1)[1], source)
    assert torch.equal(found["layers.5.weight"], source["layers.5.weight"])
    half = SMALL.model_copy(update={"image_size": 64, "width": 2})
    found = fitting(networks(half, seed=1)[1], source)
    assert torch.equal(found["layers.5.weight"], source["layers.2.weight"])
    assert torch.equal(found["head.weight"], source["head.weight"])


def write(folder: Path, name: str, network: nn.Module, kind: str, config: NetworkConfig = SMALL) -> str:
    (folder / name).write_bytes(serialize(network, config, kind, 64))  # type: ignore[arg-type]
    return str(folder / name)


def test_files_of_single_networks(tmp_path: Path) -> None:
    generator, discriminator = networks(SMALL)
    ema = write(tmp_path, "a.safetensors", generator, "ema")
    d = write(tmp_path, "d.safetensors", discriminator, "discriminator")
    ours = dict(zip(("generator", "discriminator"), networks(SMALL, seed=1), strict=True))
    ours["average"] = networks(SMALL, seed=2)[0]
    record = fill(ours, read_initial([ema, d]))  # type: ignore[arg-type]
    assert torch.equal(ours["generator"].get_parameter("layers.0.weight"), generator.get_parameter("layers.0.weight"))
    assert torch.equal(ours["average"].get_parameter("layers.0.weight"), generator.get_parameter("layers.0.weight"))
    assert torch.equal(ours["discriminator"].get_parameter("head.weight"), discriminator.get_parameter("head.weight"))
    assert [(one["network"], one["images_seen"], one["new"]) for one in record] == [
        ("generator", 64, []),
        ("discriminator", 64, []),
    ]
    assert sentences(record[:1]) == [
        "generator: 7 of 7 layers from a.safetensors",
        "discriminator: new, nothing was named for it",
    ]
    with pytest.raises(UsageError, match="names a second discriminator"):
        read_initial([d, d])


def test_the_examples_generator_and_discriminator(tmp_path: Path) -> None:
    """netG and netD of pytorch/examples at 64 pixels: their layers are those of network.width=ngf."""
    config = NetworkConfig(image_size=64, width=4, latent_dim=100)
    generator, discriminator = networks(config, seed=3)
    for name, network in (("netG.pth", generator), ("netD.pth", discriminator)):
        theirs = {
            ("main.11.weight" if key == "head.weight" else key.replace("layers.", "main.")): value
            for key, value in network.state_dict().items()
        }
        torch.save(theirs, tmp_path / name)
    found = read_initial([str(tmp_path / "netG.pth"), str(tmp_path / "netD.pth")])
    assert [(one.network, one.config.image_size, one.config.width, one.config.channels) for one in found] == [
        ("generator", 64, 4, 3),
        ("discriminator", 64, 4, 3),
    ]
    for one, network in zip(found, (generator, discriminator), strict=True):
        taken = fitting(network, one.tensors)
        assert taken.keys() == network.state_dict().keys()
        assert all(torch.equal(taken[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("change", [{"width": 8}, {"architecture": "residual"}], ids=str)
def test_weights_that_do_not_fit_are_refused_with_the_difference(tmp_path: Path, change: dict[str, object]) -> None:
    file = write(tmp_path, "g.safetensors", networks(SMALL)[0], "raw")
    other = NetworkConfig.model_validate({**SMALL.model_dump(), **change})
    (key,) = change
    with pytest.raises(ConfigConflict, match=f"none of its layers fits this run's generator: network.{key} is "):
        fill({"generator": networks(other)[0], "average": networks(other)[0]}, read_initial([file]))  # type: ignore[dict-item]


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(DataError, match="expected a generator as"):
        read_initial([str(tmp_path / "x.pth")])
    generator = networks(SMALL)[0]
    generator.get_parameter("layers.0.weight").data[0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        read_initial([write(tmp_path, "n.safetensors", generator, "raw")])
    with pytest.raises(DataError, match="--init-from nowhere: nothing there"):
        read_initial(["nowhere"])
