"""Every form of --ckpt becomes the network that it names, and nothing else does."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.checkpoints.reference import load_discriminator, load_generator
from pipeline.checkpoints.store import CheckpointStore
from pipeline.checkpoints.weights import FILE_OF_KIND, serialize
from pipeline.common.errors import DataError
from pipeline.common.storage import Store
from pipeline.config import NetworkConfig
from pipeline.model.networks import build_discriminator, build_generator, initialize

CONFIG = NetworkConfig(image_size=32, width=4, latent_dim=6, channels=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints, of which the second is the best; each generator has other weights."""
    folder = tmp_path_factory.mktemp("weights") / "run"
    store = CheckpointStore(Store(folder))
    for images, swd in ((100, 5.0), (200, 1.0), (300, 3.0)):
        generator, discriminator = build_generator(CONFIG), build_discriminator(CONFIG)
        initialize(generator, images, lane=0)
        files = {
            FILE_OF_KIND["ema"]: serialize(generator, CONFIG, "ema", images),
            FILE_OF_KIND["raw"]: serialize(generator, CONFIG, "raw", images),
            FILE_OF_KIND["discriminator"]: serialize(discriminator, CONFIG, "discriminator", images),
        }
        store.save(images, files, {"metrics": {"swd": swd}})
    return folder


@pytest.mark.parametrize(
    ("suffix", "images", "kind"),
    [
        ("", 200, "ema"),
        ("@best", 200, "ema"),
        ("@last", 300, "ema"),
        ("@100", 100, "ema"),
        ("/checkpoints/000000000300", 300, "ema"),
        ("/checkpoints/000000000100/generator.safetensors", 100, "raw"),
    ],
)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_references(run: Path, scheme: str, suffix: str, images: int, kind: str) -> None:
    loaded = load_generator(f"{scheme}{run}{suffix}")
    expected = build_generator(CONFIG)
    initialize(expected, images, lane=0)
    assert (loaded.images_seen, loaded.kind, loaded.config) == (images, kind, CONFIG)
    assert str(images) in loaded.source
    assert not loaded.generator.training
    name = "layers.0.weight"
    assert torch.equal(loaded.generator.get_parameter(name), expected.get_parameter(name))


def test_the_source_is_absolute(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes into messages."""
    monkeypatch.chdir(run)
    source = load_generator("checkpoints/000000000100/generator.safetensors").source
    assert source == str(run / "checkpoints/000000000100/generator.safetensors")
    assert load_generator("./checkpoints/000000000100").source.startswith(f"{run}/checkpoints/")


def test_discriminator(run: Path) -> None:
    assert load_discriminator(str(run)).images_seen == 200


@pytest.mark.parametrize(
    ("suffix", "words"),
    [
        ("/nothing", ["nothing there"]),
        ("@400", ["400", "000000000300"]),
        ("/checkpoints", ["no finished checkpoint"]),
        ("/checkpoints/000000000100/discriminator.safetensors", ["discriminator", "expected a generator"]),
        ("/checkpoints/000000000100/none.safetensors", ["none.safetensors", "no such file"]),
    ],
)
def test_wrong_references_say_what_is_there(run: Path, suffix: str, words: list[str]) -> None:
    with pytest.raises(DataError) as error:
        load_generator(f"{run}{suffix}")
    for word in words:
        assert word in str(error.value)


def test_a_file_cut_short_is_refused(run: Path, tmp_path: Path) -> None:
    data = (run / "checkpoints" / "000000000100" / "generator.safetensors").read_bytes()
    file = tmp_path / "cut.safetensors"
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        load_generator(str(file))


def examples_generator(nz: int, ngf: int, nc: int) -> nn.Sequential:
    """Build netG with the names of pytorch/examples' dcgan/main.py."""
    main: list[nn.Module] = [
        nn.ConvTranspose2d(nz, ngf * 8, 4, 1, 0, bias=False),
        nn.BatchNorm2d(ngf * 8),
        nn.ReLU(True),
    ]
    for factor in (8, 4, 2):
        main += [nn.ConvTranspose2d(ngf * factor, ngf * factor // 2, 4, 2, 1, bias=False)]
        main += [nn.BatchNorm2d(ngf * factor // 2), nn.ReLU(True)]
    main += [nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh()]
    return nn.Sequential(*main)


@pytest.mark.parametrize("prefix", ["main.", "module.main."])
def test_netg_of_pytorch_examples(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    original = examples_generator(nz=20, ngf=8, nc=1)
    original(torch.randn(16, 20, 1, 1))  # moves the BatchNorm statistics
    original.eval()
    file = tmp_path / "netG_epoch_3.pth"
    torch.save({prefix + name: value for name, value in original.state_dict().items()}, file)
    loaded = load_generator(str(file))
    assert loaded.kind == "netG"
    assert loaded.config == NetworkConfig(
        image_size=64, channels=1, width=8, latent_dim=20, latent_distribution="normal"
    )
    z = torch.randn(3, 20)
    torch.testing.assert_close(loaded.generator(z), original(z[:, :, None, None]))


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must never run",)


@pytest.mark.parametrize(
    "content",
    [
        Bomb(),
        {"weights": 3},
        {"main.0.weight": torch.zeros(3, 3, 5, 5)},
        {"main.0.weight": torch.zeros(3, 3)},
        {"main.0.weight": torch.tensor(1.0)},
        {"main.0.weight": torch.zeros(3, 3), "main.1.weight": torch.zeros(3, 3, 4, 4)},
        {0: torch.zeros(3)},
        {},
    ],
)
def test_other_pickles_are_refused_and_never_run(
    tmp_path: Path, content: object, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.pth"
    torch.save(content, file)
    with pytest.raises(DataError, match="pytorch/examples"):
        load_generator(str(file))
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_diverged_are_named_as_such(tmp_path: Path, value: float) -> None:
    generator = build_generator(CONFIG)
    with torch.no_grad():
        generator.get_parameter("layers.0.weight")[0, 0] = value
    file = tmp_path / "generator.safetensors"
    file.write_bytes(serialize(generator, CONFIG, "raw", 5))
    with pytest.raises(DataError, match=r"weights are not finite \(layers.0.weight\)"):
        load_generator(str(file))
