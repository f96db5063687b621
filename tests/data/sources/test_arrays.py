"""Arrays of images in .npz, .npy and HDF5, written by numpy and h5py; StyleGAN's zips with their labels."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from picture_files import make_picture, tree
from storage_servers import python_server

from pipeline.common.imaging import encode
from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate

SMALL = ("--size", 32, "--workers", 1)


def pictures(count: int, first: int = 0) -> NDArray[np.uint8]:
    return np.stack([make_picture(first + index, 32, 32) for index in range(count)])


def found(out: Path) -> dict[str, tuple[NDArray[np.uint8], dict[str, Any]]]:
    """Return pixels and labels by key."""
    result = {}
    for images, columns in iterate(open_dataset(out), labels=True):
        for index, key in enumerate(columns["key"]):
            result[key] = images[index], {name: values[index] for name, values in columns.items() if name != "key"}
    return result


def save_h5(path: Path, **arrays: Any) -> None:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=values, chunks=(1, *values.shape[1:]), compression="gzip")


WRITERS: dict[str, Any] = {
    "a.npz": np.savez,
    "packed.npz": np.savez_compressed,
    "a.h5": save_h5,
}


@pytest.mark.parametrize("name", WRITERS)
def test_images_and_labels_of_every_file_of_arrays(dcgan_data: Any, tmp_path: Path, name: str) -> None:
    images = pictures(20)
    labels = {"labels": np.arange(20) % 3, "score": np.linspace(0, 1, 20), "boxes": np.zeros((20, 4))}
    WRITERS[name](tmp_path / name, images=images, **labels)
    done = dcgan_data("build", "arrays", tmp_path / name, tmp_path / "out", *SMALL)
    assert done.code == 0, done.err
    assert "boxes (20, 4) was passed over" in done.err
    result = found(tmp_path / "out")
    assert len(result) == 20
    for key, (pixels, values) in result.items():
        assert (pixels == images[int(key)]).all()
        assert values == {"label": int(key) % 3, "score": pytest.approx(int(key) / 19)}


def test_parts_and_a_server_give_the_same_bytes(dcgan_data: Any, tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    np.savez_compressed(tmp_path / "www" / "a.npz", images=pictures(30), labels=np.arange(30))
    options = ("--size", 32, "--shard-images", 7, "--workers", 1)
    assert dcgan_data("build", "arrays", tmp_path / "www" / "a.npz", tmp_path / "one", *options).code == 0
    for part in range(2):
        part_options = (*options, "--part", f"{part}/2", "--workers", 1)
        assert dcgan_data("build", "arrays", tmp_path / "www" / "a.npz", tmp_path / f"p{part}", *part_options).code == 0
    assert dcgan_data("merge", tmp_path / "cut", tmp_path / "p0", tmp_path / "p1").code == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "cut")
    with python_server(tmp_path / "www") as port:
        done = dcgan_data("build", "arrays", f"http://127.0.0.1:{port}/a.npz", tmp_path / "far", *SMALL)
    assert done.code == 0, done.err
    assert len(found(tmp_path / "far")) == 30


GRAY = pictures(4)[..., 0]
FORMS: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {
    "gray": (GRAY, GRAY),
    "channels first": (pictures(4).transpose(0, 3, 1, 2), pictures(4)),
    "flat planes": (pictures(4).transpose(0, 3, 1, 2).reshape(4, -1), pictures(4)),
    "fortran": (np.asfortranarray(pictures(4)), pictures(4)),
    "16 bits": (GRAY.astype(np.uint16) * 257, GRAY),
    "unit floats": (pictures(4) / np.float32(255), pictures(4)),
    "int64": (pictures(4).astype(np.int64), pictures(4)),
    "true or false": (GRAY > 127, (GRAY > 127) * np.uint8(255)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_pixels(dcgan_data: Any, tmp_path: Path, form: str) -> None:
    written, expected = FORMS[form]
    np.save(tmp_path / "a.npy", written)
    done = dcgan_data("build", "arrays", tmp_path / "a.npy", tmp_path / "out", *SMALL)
    assert done.code == 0, done.err
    for key, (pixels, _) in found(tmp_path / "out").items():
        assert (pixels == (expected[int(key)][..., None] if expected.ndim == 3 else expected[int(key)])).all()


def test_splits_of_keras_and_medmnist(dcgan_data: Any, tmp_path: Path) -> None:
    np.savez(
        tmp_path / "keras.npz", x_train=pictures(5), y_train=np.arange(5), x_test=pictures(2, 5), y_test=np.arange(2)
    )
    np.savez(tmp_path / "med.npz", train_images=pictures(5), train_labels=np.arange(5)[:, None])
    for name in ("keras", "med"):
        done = dcgan_data("build", "arrays", tmp_path / f"{name}.npz", tmp_path / name, *SMALL)
        assert done.code == 0, done.err
        result = found(tmp_path / name)
        assert sorted(result) == [f"train/{index:08d}" for index in range(5)]
        assert all(values["label"] == int(key[-8:]) for key, (_, values) in result.items())
    every = dcgan_data("build", "arrays", tmp_path / "keras.npz", tmp_path / "all", *SMALL, "--split", "all")
    assert every.code == 0, every.err
    assert (found(tmp_path / "all")["test/00000001"][0] == make_picture(6, 32, 32)).all()
    refused = dcgan_data("build", "arrays", tmp_path / "keras.npz", tmp_path / "no", *SMALL, "--split", "val")
    assert (refused.code, "has test, train, all" in refused.err) == (2, True), refused.err


def test_encoded_pictures_and_groups_of_hdf5(dcgan_data: Any, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        group = file.create_group("train")
        cells = group.create_dataset("images", (6,), dtype=h5py.vlen_dtype(np.uint8))
        for index in range(6):
            cells[index] = np.frombuffer(encode(make_picture(index, 32, 32), "png"), np.uint8)
        group.create_dataset("names", data=[f"n{index}" for index in range(6)], dtype=h5py.string_dtype())
        file["again"] = h5py.SoftLink("/train")
        file["far"] = h5py.ExternalLink("/etc/passwd", "/x")
    done = dcgan_data("build", "arrays", tmp_path / "a.hdf5", tmp_path / "out", *SMALL)
    assert done.code == 0, done.err
    for key, (pixels, values) in found(tmp_path / "out").items():
        index = int(key.removeprefix("train/"))
        assert (pixels == make_picture(index, 32, 32)).all()
        assert values == {"names": f"n{index}"}


def test_what_cannot_be_read_is_one_line(dcgan_data: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", images=np.array([{"a": 1}, None], object))
    np.savez(tmp_path / "none.npz", labels=np.arange(3))
    np.savez(tmp_path / "two.npz", first=pictures(2), second=pictures(2))
    np.save(tmp_path / "whole.npy", pictures(3))
    whole = (tmp_path / "whole.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-100])
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "text.h5").write_text("hello" * 100)
    with h5py.File(tmp_path / "outside.h5", "w") as file:
        file.create_dataset("images", (2, 8, 8), np.uint8, external=[("/etc/hostname", 0, 128)])
    cases = {
        "objects.npz": (65, "an array of Python objects"),
        "none.npz": (65, "no array of images (N, H, W, C) among its arrays: labels (3,)"),
        "two.npz": (2, "several arrays of images (first, second)"),
        "cut.npy": (65, "cut off: its header states (3, 32, 32, 3) of uint8"),
        "text.npz": (65, "no file of arrays"),
        "text.h5": (65, "not a sound HDF5 file"),
        "outside.h5": (65, "lies in other files, which are not opened"),
        "nosuch.npz": (2, "no such file"),
    }
    for name, (code, words) in cases.items():
        done = dcgan_data("build", "arrays", tmp_path / name, tmp_path / "out", *SMALL)
        assert (done.code, words in done.err) == (code, True), (name, done.err)
        assert (done.err.count("error: "), "Traceback" in done.err) == (1, False)
        assert not (tmp_path / "out").exists()
    done = dcgan_data("build", "arrays", tmp_path / "two.npz", tmp_path / "out", *SMALL, "--column", "second")
    assert done.code == 0, done.err
    np.save(tmp_path / "wide.npy", pictures(2) * 3.0)
    done = dcgan_data("build", "arrays", tmp_path / "wide.npy", tmp_path / "no", *SMALL, "--max-bad", 1)
    assert (done.code, "floating-point pixels from" in done.err) == (65, True), done.err


@pytest.mark.parametrize("labels", [[3, 1, 2], None, [[0.5, 1.0]] * 3])
def test_a_zip_of_stylegan_has_the_labels_of_its_dataset_json(dcgan_data: Any, tmp_path: Path, labels: Any) -> None:
    names = [f"0000{index % 2}/img{index:08d}.png" for index in range(3)]
    content = {"labels": None if labels is None else [list(pair) for pair in zip(names, labels, strict=True)]}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for index, name in enumerate(names):
            archive.writestr(name, encode(make_picture(index, 32, 32), "png"))
        archive.writestr("dataset.json", json.dumps(content))
    done = dcgan_data("build", "folder", tmp_path / "a.zip", tmp_path / "out", *SMALL)
    assert done.code == 0, done.err
    assert ("label hold no single values" in done.err) == (labels is not None and isinstance(labels[0], list))
    for key, (pixels, values) in found(tmp_path / "out").items():
        index = names.index(key)
        assert (pixels == make_picture(index, 32, 32)).all()
        assert values == ({"label": labels[index]} if labels == [3, 1, 2] else {})


def test_another_dataset_json_is_no_table_of_labels(dcgan_data: Any, tmp_path: Path) -> None:
    (tmp_path / "src" / "cat").mkdir(parents=True)
    (tmp_path / "src" / "cat" / "a.png").write_bytes(encode(make_picture(1), "png"))
    for text in ("{", "[]", '{"labels": {"a": "int"}}'):
        (tmp_path / "src" / "dataset.json").write_text(text)
        done = dcgan_data("build", "folder", tmp_path / "src", tmp_path / "out", *SMALL, "--overwrite")
        assert done.code == 0, done.err
    assert open_dataset(tmp_path / "out").labels == {"class": "str"}
    buffer = io.BytesIO()
    np.savez(buffer, a=np.arange(3))
    (tmp_path / "src" / "dataset.json").write_text('{"labels": [["cat/a.png"]]}')
    done = dcgan_data("build", "folder", tmp_path / "src", tmp_path / "out", *SMALL, "--overwrite")
    assert (done.code, "label 1 is no [file name, label]" in done.err) == (65, True), done.err
