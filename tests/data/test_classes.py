"""Classes of images: read from every kind of data set alike, ordered, counted; what is no class is refused."""

from pathlib import Path
from typing import Any

import pytest
from picture_files import make_folder
from support import ROOT

from pipeline.common.errors import ConfigConflict, DataError, UsageError
from pipeline.config import class_titles
from pipeline.data import classes
from pipeline.data.classes import read_classes
from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate, read_shard, shard_columns

FACES = ROOT / "data" / "faces"


@pytest.mark.parametrize("encoding", ["packed", "png", "tar"])
def test_packed_encoded_and_indexed_sets_give_the_classes_of_their_images(
    dcgan_data: Any, tmp_path: Path, encoding: str
) -> None:
    folder = make_folder(tmp_path / "pictures", 30, classes=("ant", "bee", "cow"))
    stored = "png" if encoding == "tar" else encoding
    options = ["--size", 16, "--encoding", stored, "--shard-images", 8]
    assert dcgan_data("build", "folder", folder, tmp_path / "built", *options).code == 0
    where = tmp_path / "built"
    if encoding == "tar":
        spec = str(tmp_path / "built" / "*.tar")
        assert dcgan_data("index", spec, tmp_path / "index", "--size", 16).code == 0
        where = tmp_path / "index"
    dataset = open_dataset(where)
    label = "class" if "class" in dataset.labels else next(iter(dataset.labels))
    found = read_classes(dataset, [label])
    assert found.names == ("ant", "bee", "cow")
    assert found.images == (10, 10, 10)
    wanted = [value for _, columns in iterate(dataset, labels=True) for value in columns[label]]
    assert [found.names[index] for index in found.of_image] == wanted


def test_booleans_make_one_class_of_each_combination() -> None:
    dataset = open_dataset(FACES)
    shard = dataset.shards[0]
    columns = shard_columns(dataset, shard, read_shard(dataset.store, shard))
    both = [f"{male:d}{glasses:d}" for male, glasses in zip(columns["male"], columns["eyeglasses"], strict=True)]
    found = read_classes(dataset, ["male", "eyeglasses"])
    assert found.names == ("00", "01", "10", "11")
    assert [found.names[index] for index in found.of_image[: len(both)]] == both
    assert sum(found.images) == dataset.images
    assert class_titles(found.label, found.names) == ("none", "eyeglasses", "male", "male+eyeglasses")
    one = read_classes(dataset, ["smiling"])
    assert one.names == ("false", "true")
    assert class_titles(one.label, one.names) == ("not smiling", "smiling")


def test_another_order_of_the_same_classes_is_kept_and_other_classes_are_refused() -> None:
    found = read_classes(open_dataset(FACES), ["smiling"])
    turned = found.in_order(("true", "false"), "network.classes")
    assert (turned.of_image == 1 - found.of_image).all()
    assert turned.images == found.images[::-1]
    with pytest.raises(ConfigConflict, match="the data has 'false'"):
        found.in_order(("true",), "network.classes")


@pytest.mark.parametrize(
    ("label", "error", "said"),
    [
        (["glasses"], UsageError, "has no such label; it has: male, eyeglasses"),
        (["yaw"], UsageError, "type float"),
        (["male", "hair_color"], UsageError, "hair_color is of type str"),
    ],
)
def test_what_is_no_class_is_refused_with_its_name(label: list[str], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        read_classes(open_dataset(FACES), label)


def test_missing_values_and_too_many_classes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(FACES)
    with pytest.raises(DataError, match=r"network.label seed: 5,000 classes"):
        read_classes(dataset, ["seed"])
    read = classes.label_columns
    gaps: Any = lambda *arguments: {name: [None, *values[1:]] for name, values in read(*arguments).items()}  # noqa: E731
    monkeypatch.setattr(classes, "label_columns", gaps)
    with pytest.raises(DataError, match=r"network.label male: 1 of the 5,000 images"):
        read_classes(dataset, ["male"])
