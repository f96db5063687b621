"""The sources by name, with the options that each takes."""

from collections.abc import Callable
from typing import Any

from pipeline.common.errors import UsageError
from pipeline.common.storage import is_url
from pipeline.data.sources.celeba import CelebA
from pipeline.data.sources.cifar10 import Cifar10
from pipeline.data.sources.ffhq import Ffhq
from pipeline.data.sources.folder import Folder
from pipeline.data.sources.imagenet import ImageNet
from pipeline.data.sources.interface import Source
from pipeline.data.sources.lsun import Lsun
from pipeline.data.sources.svhn import Svhn
from pipeline.data.sources.tars import Tars

SOURCES: dict[str, tuple[Callable[..., Source], frozenset[str]]] = {
    "folder": (Folder, frozenset({"labels"})),
    "lsun": (Lsun, frozenset({"categories", "split"})),
    "celeba": (CelebA, frozenset({"split"})),
    "cifar10": (Cifar10, frozenset({"split"})),
    "svhn": (Svhn, frozenset({"split"})),
    "imagenet": (ImageNet, frozenset()),
    "ffhq": (Ffhq, frozenset({"split"})),
    "webdataset": (Tars, frozenset()),
    "faces": (Folder, frozenset({"labels"})),
}
_OPTION_NAMES = {"labels": "--labels", "categories": "--category", "split": "--split"}
_RECORDED_AS = {"split": "source_split"}  # `split` is the part that --val-fraction makes


def open_source(kind: str, location: str, options: dict[str, Any]) -> tuple[Source, dict[str, Any]]:
    """Return the source, and those of its options that decide the data set. `options` holds only the options given.

    Raises UsageError for an option that this source would ignore.
    """
    make, takes = SOURCES[kind]
    for name in options:
        if name not in takes:
            raise UsageError(f"{_OPTION_NAMES[name]}: has no effect on the source {kind}")
    location = location.removeprefix("file://")
    source = make(location if is_url(location) else location.rstrip("/") or "/", **options)
    described = {_RECORDED_AS.get(name, name): value for name, value in options.items()}
    if options.get("labels") not in (None, "folders", "none"):
        described["labels"] = "table"  # the listing's fingerprint covers its content, so its path does not matter
    return source, {"kind": kind, **described}
