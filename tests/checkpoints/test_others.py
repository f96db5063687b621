"""Weights as people keep them: wrapped, nested, of other repositories; and what is none of them is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.checkpoints.reference import load_discriminator, load_generator
from pipeline.common.errors import DataError

NZ, WIDTH = 6, 4


def up(inputs: int, outputs: int, first: bool = False, bias: bool = False) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, 4, 1 if first else 2, 0 if first else 1, bias=bias)


def down(inputs: int, outputs: int, last: bool = False, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 4, 1 if last else 2, 0 if last else 1, bias=bias)


SHAPES = ((NZ, WIDTH * 4), (WIDTH * 4, WIDTH * 2), (WIDTH * 2, WIDTH), (WIDTH, 3))
"""Maps into and out of each layer of a generator of 32 pixels."""


class Original(nn.Sequential):
    """A generator that runs, and its tensors under the names of another repository."""

    keys: dict[str, Tensor]


def generator(name: str = "main", bias: bool = False) -> Original:
    """Return a generator that runs, whose keys are those of the repository that names its layers like `name`."""
    layers = []
    for number, (inputs, outputs) in enumerate(SHAPES):
        convolution, norm = up(inputs, outputs, number == 0, bias), nn.BatchNorm2d(outputs)
        layers.append((convolution, norm) if number < len(SHAPES) - 1 else (convolution,))
    all_names: dict[str, Callable[[int], tuple[str, str]]] = {
        "main": lambda n: (f"main.{3 * n}", f"main.{3 * n + 1}"),  # pytorch/examples
        "tconv": lambda n: (f"tconv{n + 1}", f"bn{n + 1}"),  # Natsu6767/DCGAN-PyTorch
        "deconv": lambda n: (f"deconv{n + 1}", f"deconv{n + 1}_bn"),  # znxlwm/pytorch-MNIST-CelebA-GAN-DCGAN
        "format": lambda n: (  # facebookresearch/pytorch_GAN_zoo
            ("formatLayer", "main.convTranspose1", "main.convTranspose2", "main.outlayer")[n],
            f"main.batchNorm{n}",
        ),
        "gen": lambda n: (f"gen.{n}.0", f"gen.{n}.1"),  # Lightning-Bolts
    }
    names = all_names[name]
    network = Original(*[part for pair in layers for part in (*pair, nn.ReLU() if len(pair) == 2 else nn.Tanh())])
    network(torch.randn(8, NZ, 1, 1))  # moves the BatchNorm statistics
    network.eval()
    network.keys = {
        f"{key}.{leaf}": value
        for number, pair in enumerate(layers)
        for key, layer in zip(names(number), pair, strict=False)
        for leaf, value in layer.state_dict().items()
    }
    return network


def discriminator(bias: bool = False) -> nn.Sequential:
    return nn.Sequential(
        down(3, WIDTH, bias=bias),
        nn.LeakyReLU(0.2),
        down(WIDTH, WIDTH * 2, bias=bias),
        nn.BatchNorm2d(WIDTH * 2),
        nn.LeakyReLU(0.2),
        down(WIDTH * 2, WIDTH * 4, bias=bias),
        nn.BatchNorm2d(WIDTH * 4),
        nn.LeakyReLU(0.2),
        down(WIDTH * 4, 1, last=True, bias=bias),
    ).eval()


def prefixed(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in tensors.items()}


def assert_same_images(file: Path, original: Original) -> None:
    loaded = load_generator(str(file))
    assert (loaded.kind, loaded.config.image_size, loaded.config.latent_distribution) == ("netG", 32, "normal")
    z = torch.randn(3, NZ)
    torch.testing.assert_close(loaded.generator(z), original(z[:, :, None, None]))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapped_weights(tmp_path: Path, prefix: str) -> None:
    original = generator()
    torch.save(prefixed(prefix, original.keys), tmp_path / "netG.pth")
    assert_same_images(tmp_path / "netG.pth", original)


@pytest.mark.parametrize("name", ["netG", "generator", "state_dict", "model", "generator_state_dict", "G"])
def test_weights_beside_other_things(tmp_path: Path, name: str) -> None:
    original = generator()
    content = {"epoch": 3, name: original.keys, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    torch.save(content, tmp_path / "last.ckpt")  # nor does the file's name say what it is
    assert_same_images(tmp_path / "last.ckpt", original)


def test_the_average_of_the_weights_comes_first(tmp_path: Path) -> None:
    raw, averaged = generator(), generator()
    torch.save({"netG": raw.keys, "netG_ema": averaged.keys}, tmp_path / "netG.pt")
    assert_same_images(tmp_path / "netG.pt", averaged)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
@pytest.mark.parametrize("name", ["main", "tconv", "deconv", "format", "gen"])
def test_layouts_of_other_repositories(tmp_path: Path, name: str, suffix: str, bias: bool) -> None:
    original, file = generator(name, bias), tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(dict(original.keys), file)
    assert_same_images(file, original)
    assert load_generator(str(file)).config.bias == bias


def test_one_file_with_both_networks(tmp_path: Path) -> None:
    """Lightning keeps the weights of all parts of a module in one state_dict."""
    original, critic = generator("gen"), discriminator()
    both = prefixed("generator.", original.keys) | prefixed("discriminator.disc.", critic.state_dict())
    torch.save({"state_dict": both, "epoch": 1}, tmp_path / "last.ckpt")
    assert_same_images(tmp_path / "last.ckpt", original)
    images = torch.randn(2, 3, 32, 32)
    found = load_discriminator(str(tmp_path / "last.ckpt")).discriminator(images)
    torch.testing.assert_close(found, critic(images).flatten())


@pytest.mark.parametrize("bias", [False, True])
def test_netd_beside_netg(tmp_path: Path, bias: bool) -> None:
    critic = discriminator(bias)
    torch.save(generator().keys, tmp_path / "netG_epoch_3.pth")
    torch.save(prefixed("main.", critic.state_dict()), tmp_path / "netD_epoch_3.pth")
    images = torch.randn(2, 3, 32, 32)
    for name in ("netG_epoch_3.pth", "netD_epoch_3.pth"):
        loaded = load_discriminator(str(tmp_path / name))
        assert loaded.source.endswith("netD_epoch_3.pth")
        torch.testing.assert_close(loaded.discriminator(images), critic(images).flatten())
    with pytest.raises(DataError, match=r"netD_epoch_3.pth: holds a discriminator, expected a generator"):
        load_generator(str(tmp_path / "netD_epoch_3.pth"))


def upsampling_generator() -> nn.Module:
    """Build like eriklindernoren/PyTorch-GAN's: a linear layer, then nearest neighbors and 3x3 convolutions."""
    blocks = nn.Sequential(nn.BatchNorm2d(8), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 3, padding=1))
    return nn.ModuleDict({"l1": nn.Sequential(nn.Linear(NZ, 8)), "conv_blocks": blocks})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (upsampling_generator().state_dict(), r"holds l1.0.weight \[8, 6\], conv_blocks.2.weight"),
        ({"epoch": 3, "weights": {"a": torch.zeros(2)}}, "holds epoch, weights; expected .* under .*netg.* or model"),
        ({"state_dict": 3}, "holds state_dict"),
        (generator().keys | {"label.weight": torch.zeros(10, NZ)}, "label.weight"),
        ({**generator().keys, "main.9.weight": torch.zeros(WIDTH, 5, 4, 4)}, "channels 5"),
        ({**generator().keys, "main.9.weight": torch.zeros(WIDTH + 1, 3, 4, 4)}, "expected a generator"),
    ],
)
def test_what_is_something_else_is_named(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(DataError, match=f"model.pth: {words}" if words.startswith("holds") else words):
        load_generator(str(tmp_path / "model.pth"))
