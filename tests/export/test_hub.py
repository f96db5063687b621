"""dcgan-export hub: a folder that the Hub takes, that opens again, and that says nothing of this machine."""

import re
import socket
import tempfile
from pathlib import Path

import numpy as np
import pytest
from export_cases import SMALL, Cli, make_generator
from huggingface_hub import ModelCard
from PIL import Image
from support import ROOT

from export.hub.folder import write_hub_folder
from export.hub.model_card import example
from pipeline.checkpoints.reference import load_generator
from pipeline.checkpoints.store import CheckpointStore
from pipeline.checkpoints.weights import serialize
from pipeline.common.randomness import Purpose
from pipeline.common.storage import Store
from pipeline.config import NetworkConfig, load_config
from pipeline.model.latents import latents

FILES = ["README.md", "config.json", "generator.safetensors", "model.json", "model.onnx", "samples.png"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has saved once, with what it measured there."""
    weights = serialize(make_generator(SMALL), SMALL, "ema", 1_000)
    state = {
        "config": load_config().model_dump(),
        "dataset": {"location": "faces: <of us>", "images": 500, "fingerprint": "0" * 64},
        "metrics": {"swd": 12.345678901, "ms_ssim": 0.25, "ms_ssim_real": 0.2, "swd_32": 1.0},
    }
    folder = tmp_path_factory.mktemp("runs") / "faces"
    CheckpointStore(Store(folder)).save(1_000, {"generator_ema.safetensors": weights}, state)
    return folder


@pytest.fixture(scope="module")
def hub(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder for the Hub. Read only."""
    out = tmp_path_factory.mktemp("published") / "hub"
    write_hub_folder(str(run), out, title="Faces", license="cc0-1.0", datasets=["someone/faces"], parity_images=32)
    return out


def test_the_folder_is_what_the_hub_takes(hub: Path) -> None:
    assert sorted(path.name for path in hub.iterdir()) == FILES
    card = ModelCard.load(hub / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "dcgan-pipeline"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert (data["license"], data["datasets"]) == ("cc0-1.0", ["someone/faces"])
    ssim, swd = sorted(card.data.eval_results, key=lambda result: result.metric_type)
    assert (swd.metric_type, swd.metric_value, swd.dataset_name) == ("swd", 12.345679, "someone/faces")
    assert swd.metric_args["samples"] == 500
    assert "compares checkpoints of this library only" in swd.metric_args["protocol"]
    assert (ssim.metric_type, ssim.task_type) == ("ms_ssim", "unconditional-image-generation")
    assert "`faces: <of us>`" in card.text  # as code, where it is no tag
    assert card.text.count("<of us>") == 1
    assert Image.open(hub / "samples.png").size == (8 * 32, 8 * 32)


def test_nothing_of_this_machine_is_in_it(hub: Path) -> None:
    everything = b"".join(path.read_bytes() for path in hub.iterdir()).lower()
    private = (str(hub.parent), tempfile.gettempdir(), "/home/", "/root/", f"@{socket.gethostname()}", str(ROOT))
    assert [name for name in private if name.lower().encode() in everything] == []


def test_it_opens_as_a_checkpoint_and_its_model_verifies(run: Path, hub: Path, cli: Cli) -> None:
    again, first = load_generator(str(hub)), load_generator(str(run))
    assert (again.sha256, again.images_seen) == (first.sha256, 1_000)
    assert cli("verify", hub / "model.onnx", "--ckpt", hub, "--parity-images", 32)[0] == 0


def test_another_folder_is_left_alone(run: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "config.json").write_text("{}")
    code, _, error = cli("hub", "--ckpt", run, "--out", tmp_path)
    assert (code, "holds something else" in error) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_a_folder_may_be_written_again_and_from_its_like(run: Path, tmp_path: Path, cli: Cli) -> None:
    out, second = tmp_path / "hub", tmp_path / "second"
    code, said, error = cli("hub", "--ckpt", run, "--out", out, "--parity-images", 32)
    assert code == 0, error
    assert "hf upload OWNER/NAME" in said
    assert "names no license" in said
    before = (out / "README.md").read_bytes()
    assert cli("hub", "--ckpt", run, "--out", out, "--parity-images", 32)[0] == 0
    assert (out / "README.md").read_bytes() == before
    assert cli("hub", "--ckpt", out, "--out", second, "--parity-images", 32)[0] == 0
    assert load_generator(str(second)).sha256 == load_generator(str(run)).sha256


@pytest.mark.parametrize(
    "network",
    [
        {"latent_dim": 10},
        {"latent_distribution": "normal", "channels": 1},
        {"label": ["digit"], "classes": ["zero", "one"], "class_images": [3, 4]},
    ],
)
def test_the_example_is_short_and_its_z_is_ours(network: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    config = NetworkConfig.model_validate({"width": 8, "image_size": 32, **network})
    code = example(config)
    body = [line for line in code.splitlines() if line and not re.match("from|import", line)]
    assert len(body) <= 7
    seen: dict[str, np.ndarray] = {}

    class Session:
        """Takes z in place of a graph."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def run(self, _: object, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            seen.update(feeds)
            return [np.zeros((0, 32, 32, 3), np.uint8)]

    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    exec(compile(code, "example", "exec"), {})
    ours = latents(0, Purpose.SAMPLE, 0, 64, config.latent_dim, config.latent_distribution)
    assert np.array_equal(seen["z"], ours)
    assert ("label" in seen) is bool(config.label)
