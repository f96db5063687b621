"""`dcgan-data build auto` recognizes what SRC is, and the data set is that of the command that it names."""

import io
import json
import shlex
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_files import make_folder, tree
from support import write_dataset

from pipeline.common.errors import UsageError
from pipeline.data.sources.recognize import recognize


def files(root: Path, *names: str, content: str = "") -> Path:
    """Make files with these names; a name with a slash at its end is a folder."""
    for name in names:
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content)
    return root


def tar(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    return path


def zipped(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"")
    return path


CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pictures": (lambda root: make_folder(root, 1), "folder"),
    "class folders": (lambda root: make_folder(root, 2, classes=("cat", "dog")), "folder"),
    "a zip": (lambda root: zipped(root / "pics.zip"), "folder"),
    "a folder of zips": (lambda root: zipped(root / "cat.zip").parent, "folder"),
    "a tar of pictures": (lambda root: tar(root / "a.tar", "x/1.jpg", "x/2.jpg"), "folder"),
    "a tar of samples": (lambda root: tar(root / "a.tar", "1.jpg", "1.json"), "webdataset"),
    "a folder of tars of samples": (lambda root: tar(root / "a.tar", "1.jpg", "1.cls").parent, "webdataset"),
    "a data set of ours": (lambda root: write_dataset(root / "set", images=8), "webdataset"),
    "braces": (lambda root: root / "{0..3}.tar", "webdataset"),
    "LSUN": (lambda root: files(root, "bedroom_train_lmdb/data.mdb"), "lsun"),
    "one LSUN": (lambda root: files(root, "data.mdb", "lock.mdb"), "lsun"),
    "CelebA": (lambda root: files(root, "Img/img_align_celeba/1.jpg", "Anno/list_attr_celeba.txt"), "celeba"),
    "Kaggle's CelebA": (lambda root: files(root, "list_attr_celeba.csv", "img_align_celeba/a.jpg"), "celeba"),
    "CIFAR": (lambda root: files(root, "cifar-10-batches-py/data_batch_1"), "cifar10"),
    "SVHN": (lambda root: files(root, "train_32x32.mat"), "svhn"),
    "MNIST": (lambda root: files(root, "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"), "mnist"),
    "a file of EMNIST": (lambda root: files(root, "a-images-idx3-ubyte") / "a-images-idx3-ubyte", "mnist"),
    "ImageNet": (lambda root: files(root, "n01440764/a.JPEG", "n01443537/b.JPEG"), "imagenet"),
    "a copy of a Hub's set": (
        lambda root: files(root, "README.md", "data/train-00000-of-00002.parquet"),
        "huggingface",
    ),
    "save_to_disk": (lambda root: files(root, "dataset_dict.json", "train/"), "huggingface"),
    "a parquet": (lambda root: files(root, "a.parquet") / "a.parquet", "parquet"),
    "tables": (lambda root: files(root, "x/part.0.parquet", "x/part.1.parquet"), "parquet"),
    "a glob": (lambda root: files(root, "part.0.parquet", "part.1.parquet") / "*.parquet", "parquet"),
    "a name of the Hub": (lambda root: Path("ylecun/mnist"), "huggingface"),
    "arrays": (lambda root: files(root, "a.npz") / "a.npz", "arrays"),
    "HDF5": (lambda root: files(root, "a.h5") / "a.h5", "arrays"),
    "TFRecords": (lambda root: files(root, "train-00000-of-00002", "train-00001-of-00002", "x.txt"), "tfrecord"),
    "MDS": (lambda root: files(root, "index.json", content='{"shards": [{"format": "mds"}]}'), "mds"),
    "MDS in splits": (lambda root: files(root, "train/index.json", content='{"shards": [{"format": "mds"}]}'), "mds"),
    "litdata": (lambda root: files(root, "index.json", content='{"chunks": []}'), "litdata"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_src_is(tmp_path: Path, case: str) -> None:
    make, kind = CASES[case]
    assert recognize(str(make(tmp_path))).kind == kind


@pytest.mark.parametrize("name", ["none", "a/b/c", "text", "empty"])
def test_what_is_nothing_known_is_refused_by_name(tmp_path: Path, name: str) -> None:
    files(tmp_path, "text/a.txt", "empty/")
    with pytest.raises(UsageError, match=r"no such file or folder|not recognized"):
        recognize(str(tmp_path / name))


def test_auto_builds_what_the_command_that_it_names_builds(dcgan_data: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "a b.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4))
    options = ("--size", "8", "--workers", "1", "--where", "label>0")
    done = dcgan_data("build", "auto", tmp_path / "a b.npz", tmp_path / "out", *options)
    assert done.code == 0, done.err
    line = next(line for line in done.err.splitlines() if "The same as: " in line)
    words = shlex.split(line.partition("The same as: ")[2])
    assert words[:3] == ["dcgan-data", "build", "arrays"]
    assert words[3:] == [str(tmp_path / "a b.npz"), str(tmp_path / "out"), *options]
    assert "already built" in dcgan_data(*words[1:]).out
    first = tree(tmp_path / "out")
    assert json.loads(first["dataset.json"])["source"]["kind"] == "arrays"
    refused = dcgan_data("build", "auto", tmp_path / "nothing", tmp_path / "no")
    assert (refused.code, "no such file or folder" in refused.err) == (2, True), refused.err


def test_without_a_source_it_is_recognized(dcgan_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 8, 8), np.uint8))
    done = dcgan_data("build", "--size", 8, tmp_path / "a.npz", tmp_path / "out", "--workers", 1)
    assert done.code == 0, done.err
    assert f"The same as: dcgan-data build arrays --size 8 {tmp_path}/a.npz {tmp_path}/out --workers 1" in done.err
    same = dcgan_data("build", "--size", 8, "auto", tmp_path / "a.npz", tmp_path / "out", "--workers", 1)
    assert "already built" in same.out
    assert f"dcgan-data build arrays --size 8 {tmp_path}/a.npz" in same.err
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "folder", 2)
    for words, expected in (
        (("folder", "out"), "OUT is missing; if SRC is a folder named folder, write ./folder"),
        (("nosuch", "a.npz", "out"), "SOURCE nosuch: is not one of auto, folder"),
        (("a.npz",), "expected SRC OUT"),
        ((), "expected SRC OUT"),
    ):
        refused = dcgan_data("build", *words)
        assert (refused.code, expected in refused.err) == (2, True), refused.err
    assert dcgan_data("build", "./folder", "new", "--size", 8, "--workers", 1).code == 0
