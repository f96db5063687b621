"""`dcgan-data convert`: what it writes is read by others and by ourselves, to the same images and labels."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from picture_files import make_picture, tree
from PIL import Image

from pipeline.common.imaging import encode
from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate
from pipeline.data.sources.tars import Tars, list_dataset

SMALL = ("--size", 32, "--workers", 1)
LABELS = "file_name,number,good,score,text\n" + "".join(
    f"{i:03d}.png,{i + 5},{i % 2},{i / 2 + 0.25},t{i}\n" for i in range(11)
)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(11):
        (folder / f"{index:03d}.png").write_bytes(encode(make_picture(index, 40, 40), "png"))
    (folder / "metadata.csv").write_text(LABELS)
    return folder


def rows(dataset: Path) -> dict[int, tuple[NDArray[np.uint8], dict[str, Any]]]:
    """Return images and labels by `number`."""
    found = {}
    for images, columns in iterate(open_dataset(dataset), labels=True):
        for index, number in enumerate(columns["number"]):
            labels = {name: values[index] for name, values in columns.items() if name != "key"}
            found[number] = images[index], labels
    return found


def same(first: Path, second: Path) -> None:
    one, two = rows(first), rows(second)
    assert one.keys() == two.keys()
    for number in one:
        assert (one[number][0] == two[number][0]).all()
        assert one[number][1] == two[number][1]


@pytest.mark.parametrize("form", ["folder", "zip", "parquet"])
def test_what_is_converted_builds_the_same_images_and_labels(
    dcgan_data: Any, tmp_path: Path, pictures: Path, form: str
) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow, of the extra parquet, is not installed: make test-interop")
    assert dcgan_data("build", "folder", pictures, tmp_path / "set", *SMALL).code == 0
    target = tmp_path / "new" / ("it.zip" if form == "zip" else "it")
    done = dcgan_data("convert", tmp_path / "set", target, "--to", form)
    assert done.code == 0, done.err
    kind = "huggingface" if form == "parquet" else "folder"
    again = dcgan_data("build", kind, target, tmp_path / "again", *SMALL)
    assert again.code == 0, again.err
    same(tmp_path / "set", tmp_path / "again")
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    refused = dcgan_data("convert", tmp_path / "set", target, "--to", form)
    assert (refused.code, "is there already" in refused.err) == (2, True), refused.err


def test_a_folder_is_as_others_read_it(dcgan_data: Any, tmp_path: Path, pictures: Path) -> None:
    assert dcgan_data("build", "folder", pictures, tmp_path / "set", *SMALL).code == 0
    assert dcgan_data("convert", tmp_path / "set", tmp_path / "it").code == 0
    lines = [json.loads(line) for line in (tmp_path / "it" / "metadata.jsonl").read_text().splitlines()]
    assert sorted(path.name for path in (tmp_path / "it").glob("*.png")) == [line["file_name"] for line in lines]
    images, columns = next(iterate(open_dataset(tmp_path / "set"), labels=True))
    for index, line in enumerate(lines):
        assert (np.asarray(Image.open(tmp_path / "it" / line["file_name"])) == images[index]).all()
        expected = {name: values[index] for name, values in columns.items()}
        assert {name: value for name, value in line.items() if name != "file_name"} == expected


def test_encoded_images_stay_byte_for_byte(dcgan_data: Any, tmp_path: Path, pictures: Path) -> None:
    done = dcgan_data("build", "folder", pictures, tmp_path / "set", *SMALL, "--encoding", "jpg")
    assert done.code == 0, done.err
    assert dcgan_data("convert", tmp_path / "set", tmp_path / "it.zip", "--to", "zip").code == 0
    source = Tars(str(tmp_path / "set"))
    stored = [source.read(item) for item in list_dataset(open_dataset(tmp_path / "set")).items]
    with zipfile.ZipFile(tmp_path / "it.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        assert [archive.read(name) for name in names] == stored
    before = (tmp_path / "it.zip").read_bytes()
    assert dcgan_data("convert", tmp_path / "set", tmp_path / "it2.zip", "--to", "zip").code == 0
    assert (tmp_path / "it2.zip").read_bytes() == before


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_a_damaged_set_leaves_nothing(dcgan_data: Any, tmp_path: Path, pictures: Path, form: str) -> None:
    assert dcgan_data("build", "folder", pictures, tmp_path / "set", *SMALL, "--shard-images", 4).code == 0
    last = sorted((tmp_path / "set").glob("*.tar"))[-1]
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    before = tree(tmp_path)
    done = dcgan_data("convert", tmp_path / "set", tmp_path / "new" / "it", "--to", form)
    assert (done.code, "SHA-256" in done.err) == (65, True), done.err
    assert tree(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_what_was_written_is_durable_and_nothing_else_is_waited_for(
    dcgan_data: Any, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dcgan_data("build", "folder", pictures, tmp_path / "set", *SMALL).code == 0
    synced: list[str] = []
    fsync = os.fsync

    def note(handle: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "sync", lambda: pytest.fail("the whole machine was synced"))
    assert dcgan_data("convert", tmp_path / "set", tmp_path / "it").code == 0
    assert {path.name for path in (tmp_path / "it").iterdir()} <= set(synced)
    assert synced[-1] == tmp_path.name, "the rename, too"
