"""Where the files of a table lie: a folder, a glob, a repository of the Hub; and which split each belongs to."""

import glob
import os
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from pipeline.common.errors import DataError, UsageError
from pipeline.common.storage import Store, is_url
from pipeline.data.sources.tables.files import SUFFIXES

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words by which Hugging Face knows a split in the names of files and folders."""
_SPLITS = {word: split for split, words in WORDS.items() for word in words}
_SHARD = re.compile(r"(?P<name>.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w.~/-]+)?")


def is_table(name: str) -> bool:
    """Whether a file is a table, by its name. Of `datasets`, cached results of `map` are none."""
    file = name.rpartition("/")[2].lower()
    return file.endswith(SUFFIXES) and not file.startswith((".", "cache-", "_"))


def find_tables(location: str) -> tuple[str, list[str]]:
    """Return the folder or URL that SRC names, and the paths of the tables in it. Raises UsageError, DataError."""
    return find_named(location, is_table, ".parquet, .arrow or .feather file")


def find_named(location: str, wanted: Callable[[str], bool], expected: str) -> tuple[str, list[str]]:
    """Return the folder or URL that SRC names, and the paths of the files in it that are `wanted` by their names."""
    pattern = glob.has_magic(location) and not os.path.exists(location)
    if not pattern and (os.path.isfile(location) or wanted(location.partition("?")[0])):
        folder, slash, name = location.rpartition("/")
        return (folder or slash or "."), [name]
    root, below = location, ""
    if pattern:
        parts = location.split("/")
        first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
        root = "/".join(parts[:first]) or ("/" if location.startswith("/") else ".")
        below = "/".join(parts[first:])
    found = [path for path in _all_files(root) if not below or _matches(path, below)]
    named = sorted(path for path in found if wanted(path))
    if not named:
        there = f", but {', '.join(sorted(found)[:4])}" if found else ""
        raise DataError(f"{location}: no {expected} here{there}")
    return root, named


def joined(root: str, path: str) -> str:
    """Return where a file below a folder is."""
    return path if root == "." else f"{root.rstrip('/')}/{path}"


def hub_location(location: str) -> str:
    """Return a name of a data set on the Hub (`ylecun/mnist`) as its URL, everything else as it is."""
    if is_url(location) or os.path.exists(location) or glob.has_magic(location) or is_table(location):
        return location
    if not _HUB_NAME.fullmatch(location):
        raise UsageError(f"{location}: no such folder, and no name of a data set on the Hub, such as ylecun/mnist")
    return f"hf://datasets/{location}"


def select(location: str, paths: list[str], config: str | None, split: str | None) -> tuple[dict[str, str], str | None]:
    """Return those of `paths` that belong to a configuration and a split, each with its split, and a note.

    Both follow from the names of files and folders: `CONFIG/SPLIT-00000-of-00001.parquet`, `data/SPLIT-…`,
    `CONFIG/SPLIT/0000.parquet`. Without `split`, `train` is taken where there is one.
    """
    placed = {path: _place(path) for path in paths}
    configs = sorted({place[0] for place in placed.values()})
    if config is not None and config not in configs:
        raise UsageError(f"--config {config}: {location} has {', '.join(configs)}")
    if config is None and len(configs) > 1:
        raise UsageError(f"{location}: several configurations; choose with --config: {', '.join(configs)}")
    here = {path: place[1] for path, place in placed.items() if place[0] == (config or configs[0])}
    splits = sorted(set(here.values()))
    if split not in (None, "all", *splits):
        raise UsageError(f"--split {split}: {location} has {', '.join(splits)}; all takes every one")
    wanted = split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else None)
    if wanted is None:
        raise UsageError(f"{location}: several splits; choose with --split: {', '.join(splits)}, or all")
    chosen = {path: of for path, of in here.items() if wanted in ("all", of)}
    note = None
    if split is None and len(splits) > 1:
        note = f"the split {wanted} of {', '.join(splits)}; --split takes another one, or all"
    return chosen, note


def has_splits(paths: list[str]) -> bool:
    """Whether the names of tables say to which split they belong."""
    return any(_place(path)[1] != "all" for path in paths if is_table(path))


def _place(path: str) -> tuple[str, str]:
    """Return the configuration and the split of a file by its path in its repository."""
    *folders, name = path.split("/")
    stem = name.rpartition(".")[0]
    shard = _SHARD.fullmatch(stem)
    stem = shard["name"] if shard else stem
    split = next((_SPLITS[word] for word in reversed(re.split(r"[-_. ]", stem.lower())) if word in _SPLITS), None)
    if split is None and shard and stem != "data":
        split = stem
    if split is None and folders:
        last = folders[-1].lower().removeprefix("partial-")
        if last in _SPLITS:
            split, folders = _SPLITS[last], folders[:-1]
    config = "/".join(folder for folder in folders if folder != "data")
    return config or "default", split or "all"


def _all_files(root: str) -> list[str]:
    """Return the paths of all files below a folder or URL that are not hidden."""
    if is_url(root):
        store = Store(root)
        return [store.shown(path) for path, _ in store.find()]
    if not Path(root).is_dir():
        raise UsageError(f"{root}: no such folder or file")
    found = []
    for folder, folders, names in os.walk(root, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.relpath(os.path.join(folder, name), root) for name in names if not name.startswith(".")]
    return found


def _matches(path: str, pattern: str) -> bool:
    """Whether a path matches a glob, folder by folder; `**` stands for any number of folders."""
    names, parts = path.split("/"), pattern.split("/")

    def match(name: int, part: int) -> bool:
        if part == len(parts):
            return name == len(names)
        if parts[part] == "**":
            return match(name, part + 1) or (name < len(names) and match(name + 1, part))
        return name < len(names) and fnmatchcase(names[name], parts[part]) and match(name + 1, part + 1)

    return match(0, 0)
