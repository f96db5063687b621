"""The sources by name, with the options that each takes."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline.common.errors import UsageError
from pipeline.common.storage import is_url

if TYPE_CHECKING:
    from pipeline.data.sources.interface import Source


@dataclass(frozen=True)
class Entry:
    """One kind of source."""

    module: str
    """In pipeline.data.sources. It is imported when a source is opened: `--help` lists the sources without them."""
    name: str
    """The class that implements `Source`."""
    options: frozenset[str] = frozenset()
    """The options that it takes."""


SOURCES = {
    "folder": Entry("folder", "Folder", frozenset({"labels", "all_files"})),
    "lsun": Entry("lsun", "Lsun", frozenset({"categories", "split"})),
    "celeba": Entry("celeba", "CelebA", frozenset({"split"})),
    "cifar10": Entry("cifar10", "Cifar10", frozenset({"split"})),
    "svhn": Entry("svhn", "Svhn", frozenset({"split"})),
    "mnist": Entry("mnist", "Mnist", frozenset({"split"})),
    "imagenet": Entry("imagenet", "ImageNet"),
    "ffhq": Entry("ffhq", "Ffhq", frozenset({"split"})),
    "parquet": Entry("tables.source", "Parquet", frozenset({"column"})),
    "huggingface": Entry("tables.source", "HuggingFace", frozenset({"column", "config", "split"})),
    "arrays": Entry("packed.arrays", "Arrays", frozenset({"split", "column"})),
    "tfrecord": Entry("packed.tfrecord", "TfRecords", frozenset({"column"})),
    "mds": Entry("packed.streams", "Streams", frozenset({"split", "column"})),
    "litdata": Entry("packed.streams", "Streams", frozenset({"split", "column"})),
    "webdataset": Entry("tars", "Tars"),
    "faces": Entry("folder", "Folder", frozenset({"labels", "all_files"})),
}
AUTO = "auto"
"""In the place of a source: what SRC is is recognized."""
_OPTION_NAMES = {
    "labels": "--labels",
    "all_files": "--all-files",
    "categories": "--category",
    "split": "--split",
    "column": "--column",
    "config": "--config",
}
_RECORDED_AS = {"split": "source_split"}  # `split` is the part that --val-fraction makes


def open_source(kind: str, location: str, options: dict[str, Any]) -> "tuple[Source, dict[str, Any]]":
    """Return the source, and those of its options that decide the data set. `options` holds only the options given.

    Raises UsageError for an option that this source would ignore.
    """
    entry = SOURCES[kind]
    for name in options:
        if name not in entry.options:
            raise UsageError(f"{_OPTION_NAMES[name]}: has no effect on the source {kind}")
    location = location.removeprefix("file://")
    make = getattr(import_module(f"pipeline.data.sources.{entry.module}"), entry.name)
    source: Source = make(location if is_url(location) else location.rstrip("/") or "/", **options)
    described = {_RECORDED_AS.get(name, name): value for name, value in options.items()}
    if options.get("labels") not in (None, "folders", "none"):
        described["labels"] = "table"  # the listing's fingerprint covers its content, so its path does not matter
    return source, {"kind": kind, **described}
