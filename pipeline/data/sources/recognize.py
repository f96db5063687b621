"""Which source reads what lies at SRC: by the names of files, and where these say little, by what is inside."""

import glob
import os
import re
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import PurePosixPath
from typing import NamedTuple

from pipeline.common.errors import UsageError
from pipeline.common.pictures.formats import picture_suffixes
from pipeline.common.storage import Store, is_url, locate
from pipeline.data.sources.archives.files import compression_of, open_archive
from pipeline.data.sources.archives.members import is_archive
from pipeline.data.sources.interface import Listing
from pipeline.data.sources.packed.arrays import HDF5
from pipeline.data.sources.packed.tfrecord import is_tfrecord
from pipeline.data.sources.tables.layout import has_splits, is_table
from pipeline.data.sources.tars import open_members
from pipeline.data.specification import is_dataset

MEMBERS = 1000
"""Members of a tar that are looked at, to tell samples with labels from a packed folder."""
TAR_MAGIC = slice(257, 262)
"""Where a tar says that it is one."""
_IDX = r"-images[-.]idx3-ubyte(\.gz)?"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w.~/-]+)?")
_LISTS = ("list_attr_celeba.txt", "list_attr_celeba.csv")


class Recognized(NamedTuple):
    """What SRC is."""

    kind: str
    """The source that reads it."""
    what: str
    """In words."""


def _any(pattern: str) -> Callable[[set[str]], bool]:
    return lambda names: any(re.fullmatch(pattern, name) for name in names)


FILES: list[tuple[Callable[[str], object], Recognized]] = [
    (re.compile(r"cifar-10-python(\.tar(\.gz)?)?").fullmatch, Recognized("cifar10", "CIFAR-10, the Python version")),
    (
        re.compile(r"ilsvrc2012_img_train\.tar|n\d{8}\.tar").fullmatch,
        Recognized("imagenet", "a tar of ImageNet's classes"),
    ),
    (re.compile(rf".*{_IDX}").fullmatch, Recognized("mnist", "an images file in MNIST's format")),
    (is_table, Recognized("parquet", "a table, with a picture a row")),
    (lambda name: name.endswith((".npz", ".npy", *HDF5)), Recognized("arrays", "a file of arrays")),
    (is_tfrecord, Recognized("tfrecord", "a TFRecord")),
]
"""What a file is by its name, in lower case; the first that fits."""
FOLDERS: list[tuple[Callable[[set[str]], bool], Recognized]] = [
    (lambda names: bool(names & set(_LISTS)) or {"img", "anno"} <= names, Recognized("celeba", "CelebA")),
    (_any(r"data\.mdb|.*_lmdb"), Recognized("lsun", "LSUN's lmdb folders")),
    (_any(r"data_batch_1|cifar-10-batches-py"), Recognized("cifar10", "CIFAR-10, the Python version")),
    (_any(r"(train|test|extra)_32x32\.mat"), Recognized("svhn", "SVHN's cropped digits")),
    (_any(rf".*{_IDX}"), Recognized("mnist", "a set in MNIST's format")),
    (
        lambda names: "dataset_dict.json" in names or ("state.json" in names and any(map(is_table, names))),
        Recognized("huggingface", "what `datasets` saved to a disk"),
    ),
    (lambda names: any(map(is_table, names)), Recognized("parquet", "tables, with a picture a row")),
    (lambda names: 2 * sum(map(is_tfrecord, names)) > len(names), Recognized("tfrecord", "TFRecords")),
    (
        lambda names: len(names) > 1 and all(map(re.compile(r"n\d{8}(\.tar)?").fullmatch, names)),
        Recognized("imagenet", "ImageNet's classes"),
    ),
    (
        lambda names: any(PurePosixPath(name).suffix in picture_suffixes() for name in names),
        Recognized("folder", "a folder of pictures"),
    ),
]
"""What a folder is by the names of the files and folders in it, in lower case; the first that fits."""


def recognize(location: str) -> Recognized:
    """Return what lies at SRC. Raises UsageError when nothing says what it is, with what is there."""
    location = location.removeprefix("file://").rstrip("/") or "/"
    there = os.path.exists(location)
    if not there and not is_url(location):
        if location.startswith("@") or "::" in location or "{" in location:
            return Recognized("webdataset", "names of WebDataset tars")
        if glob.has_magic(location):
            matched = sorted(glob.glob(location, recursive=True))
            if not matched:
                raise UsageError(f"{location}: matches nothing")
            return _of_names("", [path.rpartition("/")[2] for path in matched]) or _unknown(location, matched)
        if _HUB_NAME.fullmatch(location):
            return Recognized("huggingface", "no folder here, so the name of a data set on the Hub")
        raise UsageError(f"{location}: no such file or folder")
    name = location.partition("?")[0].rpartition("/")[2]
    if os.path.isfile(location) or (is_url(location) and (is_archive(name) or _of_file(name) is not None)):
        return _of_file(name) or _of_archive(location, name)
    if is_dataset(location):
        return Recognized("webdataset", "a data set of this program")
    store = Store(location)
    names = [store.shown(entry) for entry in store.names() if not entry.startswith(".")]
    found = _of_names(location, names)
    if found is None:  # a folder around it, as in most downloads
        for folder in islice((entry for entry in names if "." not in entry), 40):
            inside = [store.shown(entry) for entry in store.names(folder) if not entry.startswith(".")]
            found = _of_names(f"{location}/{folder}", [f"{folder}/{entry}" for entry in inside], deep=True)
            if found is not None:
                break
    return found or _unknown(location, names)


def is_packed(location: str) -> bool:
    """Whether SRC is one file that holds many pictures, and neither a plain tar nor a list of tars (.json).

    On a disk this is every other file, in a store a name tells. Raises UsageError for URLs that are refused.
    """
    location = location.removeprefix("file://")
    name = location.partition("?")[0].rpartition("/")[2].lower()
    if is_url(location):
        return not name.endswith(".tar") and (is_archive(name) or _of_file(name) is not None)
    if not os.path.isfile(location):
        return False
    with open(location, "rb") as file:
        head = file.read(TAR_MAGIC.stop)
    if head[:2] == b"PK" or compression_of(head[:4]) is not None:
        return True
    return not name.endswith((".tar", ".json")) and head[TAR_MAGIC] != b"ustar"


def _unknown(location: str, names: list[str]) -> Recognized:
    raise UsageError(
        f"{location}: not recognized by its files ({', '.join(names[:6]) or 'none'}); name the source instead of auto"
    )


def _of_file(name: str) -> Recognized | None:
    """Return what a file is, by its name."""
    return next((found for test, found in FILES if test(name.lower())), None)


def _of_archive(location: str, name: str) -> Recognized:
    """Return what an archive is: by its members, if it is a tar."""
    store, inside = locate(location)
    if not store.remote and name.lower().endswith("img_align_celeba.zip"):
        folder = location.rpartition("/")[0] or "."
        if any(os.path.exists(f"{folder}/{entry}") for entry in _LISTS):
            return Recognized("celeba", "CelebA's pictures, with their lists beside them")
    size = store.facts(inside).bytes
    head = store.read_range(inside, 0, min(4, size)) if size else b""
    if head[:2] == b"PK":
        return Recognized("folder", "a zip of pictures")
    if compression_of(head) is None and ".tar" not in name.lower():
        raise UsageError(f"{location}: not recognized: neither a folder, an archive, a table nor arrays")
    listing = Listing({})
    with (opened := open_archive(location, listing)).file:
        members = [path for path, _, _ in islice(open_members(opened.file, location, listing), MEMBERS)]
    kind = "webdataset" if _has_samples(members) else "folder"
    return Recognized(kind, "a WebDataset tar" if kind == "webdataset" else "a tar of pictures")


def _has_samples(members: Iterable[str]) -> bool:
    """Whether members belong together by their names up to the first dot, as in a WebDataset tar."""
    suffixes: dict[str, set[str]] = {}
    for path in members:
        folder, _, name = path.rpartition("/")
        stem, _, suffix = name.partition(".")
        suffixes.setdefault(f"{folder}/{stem}", set()).add(suffix.lower())
    beside = {"json", "cls", "txt", "npy"}
    return any(found & beside and len(found) > 1 for found in suffixes.values()) or any(
        found == {"npy"} for found in suffixes.values()
    )


def _of_names(location: str, names: list[str], *, deep: bool = False) -> Recognized | None:
    """Return what a folder with these files and folders is. `deep` says that it lies in SRC, and names begin there."""
    lower = {name.rpartition("/")[2].lower() for name in names}
    store = Store(location) if location else None
    if "index.json" in lower and store is not None and (kind := _kind_of_index(store)) is not None:
        return kind
    if any(map(is_table, lower)) and has_splits(names):
        return Recognized("huggingface", "a data set of the Hub")
    if (found := next((found for test, found in FOLDERS if test(lower)), None)) is not None:
        return found
    if deep or not (tars := [name for name in names if is_archive(name)]):
        return None
    plain = [name for name in tars if name.lower().endswith(".tar")]
    return _of_archive(f"{location}/{plain[0]}", plain[0]) if plain else Recognized("folder", "archives of pictures")


def _kind_of_index(store: Store) -> Recognized | None:
    text = store.read("index.json")[: 1 << 20]
    if b'"shards"' in text and b'"mds"' in text:
        return Recognized("mds", "a folder of MosaicML's streaming")
    return Recognized("litdata", "a folder of litdata") if b'"chunks"' in text else None
