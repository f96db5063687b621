"""The source `mnist` reads true IDX files: pixels and digits exact, gz or plain, hostile files refused."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate

TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"


def write_idx(path: Path, values: NDArray[np.uint8], *, pack: bool = False) -> None:
    """Write an array as an IDX file, `pack` as gz."""
    data = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(data) if pack else data)


def write_mnist(folder: Path, count: int = 30, name: str = TRAIN, *, pack: bool = False) -> NDArray[np.uint8]:
    """Write `count` images and their labels, i mod 10; return the images."""
    folder.mkdir(exist_ok=True)
    images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
    suffix = ".gz" if pack else ""
    write_idx(folder / f"{name}{suffix}", images, pack=pack)
    labels = name.replace("-images", "-labels").replace("idx3", "idx1")
    write_idx(folder / f"{labels}{suffix}", np.arange(count, dtype=np.uint8) % 10, pack=pack)
    return images


@pytest.mark.parametrize("pack", [False, True])
def test_digits_are_padded_to_32_pixels_and_keep_their_labels(dcgan_data: Any, tmp_path: Path, pack: bool) -> None:
    images = write_mnist(tmp_path / "mnist", pack=pack)
    write_mnist(tmp_path / "mnist", 7, TEST, pack=pack)
    out = tmp_path / "out"
    done = dcgan_data("build", "mnist", tmp_path / "mnist", out, "--size", 32, "--channels", 1, "--split", "all")
    assert done.code == 0, done.err
    dataset = open_dataset(out)
    assert (dataset.images, dataset.image_size, dataset.channels, dataset.labels) == (37, 32, 1, {"label": "int"})
    found = 0
    for pixels, columns in iterate(dataset, labels=True):
        for image, key, label in zip(pixels, columns["key"], columns["label"], strict=True):
            split, _, number = key.partition("/")
            assert label == int(number) % 10
            if split == "train":
                found += 1
                assert (image[2:30, 2:30, 0] == images[int(number)]).all()
                assert image.sum() == images[int(number)].sum(dtype=int)
    assert found == 30
    done = dcgan_data("show", out, "--label", "label")
    assert "classes of label" in done.out
    assert "3: 4 (10.8%)" in done.out


def test_emnist_is_upright_and_one_of_its_sets_is_named(dcgan_data: Any, tmp_path: Path) -> None:
    name = "emnist-digits-train-images-idx3-ubyte"
    images = write_mnist(tmp_path / "sets", 12, name)
    write_mnist(tmp_path / "sets", 5, "emnist-letters-train-images-idx3-ubyte")
    options = ["--size", 32, "--channels", 1]
    many = dcgan_data("build", "mnist", tmp_path / "sets", tmp_path / "out", *options)
    assert many.code == 2
    assert "several sets here" in many.err
    done = dcgan_data("build", "mnist", tmp_path / "sets" / name, tmp_path / "out", *options)
    assert done.code == 0, done.err
    pixels, columns = next(iter(iterate(open_dataset(tmp_path / "out"), labels=True)))
    first = pixels[columns["key"].index("train/000000")]
    assert (first[2:30, 2:30, 0] == images[0].T).all()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / TRAIN).write_bytes((folder / TRAIN).read_bytes()[:-1]), "expected an IDX file"),
        (lambda folder: (folder / TRAIN).write_bytes(b"\0\0\x0d\x03" + bytes(12)), "expected an IDX file"),
        (lambda folder: (folder / TRAIN).write_bytes(gzip.compress(bytes(900))[:-9]), "cut off"),
        (lambda folder: write_idx(folder / "train-labels-idx1-ubyte", np.zeros(9, np.uint8)), "9 labels"),
        (lambda folder: (folder / "train-labels-idx1-ubyte").unlink(), "it holds the labels"),
        (lambda folder: (folder / TRAIN).unlink(), "no images of the split train"),
    ],
)
def test_what_is_no_mnist_is_refused_in_one_line(dcgan_data: Any, tmp_path: Path, harm: Any, said: str) -> None:
    write_mnist(tmp_path / "mnist")
    harm(tmp_path / "mnist")
    done = dcgan_data("build", "mnist", tmp_path / "mnist", tmp_path / "out", "--size", 32)
    assert done.code in (2, 65)
    assert said in done.err
    assert done.err.count("error: ") == 1
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()
