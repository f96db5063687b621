"""dcgan-generate of a conditional model: every image has the label that was asked for, and it lies beside it."""

import csv
import gzip
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deploy.generation.labels import plan_labels
from export.builders.onnx_model import export_onnx
from export.samplers.open import open_sampler
from pipeline.checkpoints.weights import serialize
from pipeline.common.imaging import decode
from pipeline.common.randomness import Purpose
from pipeline.config import NetworkConfig, load_config
from pipeline.data import cli as data_cli
from pipeline.data.classes import read_classes
from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate
from pipeline.model.labels import draw_classes
from pipeline.model.latents import latents
from pipeline.model.networks import build_generator, initialize
from pipeline.training.loop import train

Run = Callable[..., tuple[str, str]]
SINGLE = {"label": ["digit"], "classes": ["0", "1", "7"]}
SEVERAL = {"label": ["male", "bald"], "classes": ["00", "10", "11"]}
TEXTS = {"label": ["kind"], "classes": ["cat", "red, dark"], "class_images": [1, 2]}
BOOL = {"label": ["smiling"], "classes": ["false", "true"], "class_images": [1, 2]}


def network(**settings: Any) -> NetworkConfig:
    values = {"image_size": 32, "width": 4, "latent_dim": 6, "channels": 1, "class_images": [500, 100, 400]}
    return NetworkConfig.model_validate(values | settings)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weights of two conditional generators whose images differ by their label."""
    folder, paths = tmp_path_factory.mktemp("conditional"), {}
    for name, settings in {"single": SINGLE, "several": SEVERAL}.items():
        generator: Any = build_generator(network(**settings))
        initialize(generator, 1, lane=0)
        torch.manual_seed(0)
        for module in generator.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight)
        generator.layers[-2].weight.data *= 20
        path = folder / f"{name}.safetensors"
        path.write_bytes(serialize(generator.eval(), generator.config, "ema", 0))
        paths[name] = str(path)
    return paths


def stored(folder: Path, *labels: str) -> tuple[np.ndarray, list[Any]]:
    """Return the images and labels of a generation, in their order."""
    images: list[np.ndarray] = []
    values: list[Any] = []
    for pixels, columns in iterate(open_dataset(folder), labels=True):
        images.append(pixels)
        values += zip(*(columns[name] for name in labels), strict=True)
    return np.concatenate(images), values


@pytest.mark.parametrize("format", ["packed", "png"])
def test_two_parts_equal_the_whole_and_labels_lie_beside_their_images(
    run: Run, tmp_path: Path, conditional: dict[str, str], format: str
) -> None:
    options = ["--model", conditional["single"], "--label", "7,0", "--start", 3, "--count", 70, "--format", format,
               "--shard-images", 32, "--encoders", 1, "--batch", 16]  # fmt: skip
    run(*options, "--out", tmp_path / "whole")
    for part in "10":
        run(*options, "--out", tmp_path / "parts", "--part", f"{part}/2")
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.tar")}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "parts").glob("*.tar")}
    images, values = stored(tmp_path / "parts", "digit")
    assert values == [((7, 0)[index % 2],) for index in range(3, 73)]
    with open_sampler(conditional["single"], batch=16) as sampler:
        z = latents(0, Purpose.SAMPLE, 3, 70, 6)
        expected = sampler.sample(z, labels=[str(value) for (value,) in values]).astype(int)
        assert np.abs(images - expected).max() <= 1
        assert np.abs(sampler.sample(z, labels="1") - expected).mean() > 2, "the label decides"
    manifest = json.loads((tmp_path / "parts" / "manifest.json").read_text())
    assert manifest["plan"]["labels"]["draw"] == "chosen"
    assert manifest["plan"]["labels"]["chosen"] == ["7", "0"]
    dataset = open_dataset(tmp_path / "parts")
    assert dataset.labels == {"digit": "int"}
    assert read_classes(dataset, ["digit"]).images == (35, 35)
    run("merge", tmp_path / "parts")


def test_parts_of_another_request_are_refused(run: Run, tmp_path: Path, conditional: dict[str, str]) -> None:
    options = ["--model", conditional["single"], "--count", 40, "--format", "packed", "--shard-images", 32,
               "--part", "0/2", "--out", tmp_path]  # fmt: skip
    run(*options, "--label", "7")
    error = run(*options, "--label", "0", code=78)[1]
    assert "holds another generation (labels.chosen 7 != 0)" in error
    error = run(*options, "--labels", "balanced", code=78)[1]
    assert "labels.draw chosen != balanced" in error
    assert error.count("\n") == 1


def test_labels_are_drawn_as_trained_or_balanced(run: Run, tmp_path: Path, conditional: dict[str, str]) -> None:
    options = ["--model", conditional["several"], "--start", 5, "--count", 60, "--format", "packed", "--seed", 3]
    run(*options, "--out", tmp_path / "drawn")
    images, values = stored(tmp_path / "drawn", "male", "bald")
    drawn = draw_classes(network(**SEVERAL), 3, Purpose.SAMPLE, 5, 60)
    assert values == [((False, False), (True, False), (True, True))[number] for number in drawn]
    with open_sampler(conditional["several"]) as sampler:
        expected = np.concatenate([block for _, block in sampler.sample_range(3, 5, 60)])
    assert np.array_equal(images, expected)
    assert open_dataset(tmp_path / "drawn").labels == {"male": "bool", "bald": "bool"}
    run(*options, "--out", tmp_path / "named", "--labels", "as-trained")
    assert np.array_equal(stored(tmp_path / "named")[0], images)
    run(*options, "--out", tmp_path / "even", "--labels", "balanced")
    assert stored(tmp_path / "even", "male", "bald")[1][:4] == [
        (True, True),
        (False, False),
        (True, False),
        (True, True),
    ]


def test_plain_pictures_have_a_table_that_a_build_reads(run: Run, tmp_path: Path, conditional: dict[str, str]) -> None:
    np.save(tmp_path / "z.npy", np.repeat(latents(0, Purpose.SAMPLE, 0, 1, 6), 6, axis=0))
    out = tmp_path / "out"
    run("--model", conditional["several"], "--latents", tmp_path / "z.npy", "--label", "none, bald+male,bald",
        "--format", "png", "--layout", "folder", "--sheet", "2x3", "--out", out)  # fmt: skip
    rows = list(csv.reader((out / "labels.csv").read_text().splitlines()))
    assert rows[:4] == [
        ["file_name", "male", "bald"],
        ["000000.png", "false", "false"],
        ["000001.png", "true", "true"],
        ["000002.png", "false", "true"],
    ]
    pictures = [decode((out / f"{index:06d}.png").read_bytes(), 1) for index in range(6)]
    assert np.array_equal(pictures[0], pictures[3])
    assert not np.array_equal(pictures[0], pictures[1]), "one z, another label"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("single", ["--label", "3"], "--label '3': the model has no such class of digit; it has 0, 1, 7"),
        ("single", ["--label", "7,"], "--label '': the model has no such class"),
        ("several", ["--label", "bald+hat"], "it has none, or some of male, bald with + between them"),
        ("single", ["--label", "7", "--labels", "balanced"], "--label 7 --labels balanced: choose one"),
        ("plain", ["--label", "7"], "--label 7: the model is not conditioned on a label"),
        ("plain", ["--labels", "balanced"], "--labels balanced: the model is not conditioned"),
    ],
)
def test_labels_that_are_not_there_are_one_line(
    run: Run, tmp_path: Path, conditional: dict[str, str], model: str, kind: str,
    options: list[object], message: str
) -> None:  # fmt: skip
    path = model if kind == "plain" else conditional[kind]
    error = run("--model", path, "--count", 3, "--out", tmp_path / "out", *options, code=2)[1]
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_values_have_the_type_of_their_data() -> None:
    texts = plan_labels(network(**TEXTS), "red, dark", None)
    assert (texts.chosen, texts.types, texts.values(0, 0, 1)) == (("red, dark",), {"kind": "str"}, [("red, dark",)])
    smiling = plan_labels(network(**BOOL), "not smiling,smiling", None)
    assert (smiling.types, smiling.values(0, 0, 2)) == ({"smiling": "bool"}, [(False,), (True,)])
    assert smiling.columns(0, 1, 2).tolist() == [[1], [0]]


def test_mnist_is_built_trained_exported_and_generated_digit_by_digit(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, values in {
        "images-idx3": np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8),
        "labels-idx1": np.arange(40, dtype=np.uint8) % 10,
    }.items():
        header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "dcgan-data",
            "build",
            "mnist",
            str(tmp_path),
            str(tmp_path / "data"),
            "--size",
            "32",
            "--channels",
            "1",
        ],
    )
    with pytest.raises(SystemExit) as end:
        data_cli.main()
    assert not end.value.code
    settings = ["network.width=4", "network.latent_dim=6", "recipe.batch=16", "total_images=32", "recipe.streams=8"]
    config = load_config("mnist32_conditional", overrides=settings)
    train(config, data=str(tmp_path / "data"), out=tmp_path / "run")
    card = export_onnx(str(tmp_path / "run"), tmp_path / "model", max_batch=16, parity_images=20)
    assert card.network.classes == tuple("0123456789")
    model, z = tmp_path / "model" / "model.onnx", np.repeat(latents(0, Purpose.SAMPLE, 0, 1, 6), 20, axis=0)
    np.save(tmp_path / "z.npy", z)
    run("--model", model, "--latents", tmp_path / "z.npy", "--label", "0,1,2,3,4,5,6,7,8,9", "--format", "packed",
        "--out", tmp_path / "digits")  # fmt: skip
    images, labels = stored(tmp_path / "digits", "label")
    assert labels == [(digit,) for digit in [*range(10), *range(10)]]
    assert np.array_equal(images[:10], images[10:]), "one z"
    assert len({image.tobytes() for image in images}) == 10, "each digit its own"
    run("--model", model, "--label", 9, "--count", 5, "--format", "packed", "--out", tmp_path / "nines")
    assert stored(tmp_path / "nines", "label")[1] == [(9,)] * 5
