"""LSUN: one or several lmdb folders of encoded images, under keys of 40 hexadecimal digits."""

import functools
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.common.errors import DataError, UnavailableError, UsageError
from pipeline.common.imaging import BadImage
from pipeline.common.storage import is_url
from pipeline.data.sources.interface import Item, Listing

_NAME = re.compile(r"(?P<category>.+?)(?:_(?P<split>train|val|test))?(?:_lmdb)?")


@dataclass(frozen=True)
class Lsun:
    """A database (`bedroom_train_lmdb`), or a folder of them narrowed by `categories` and `split`."""

    location: str
    categories: tuple[str, ...] = ()
    split: str | None = None

    def listing(self) -> Listing:
        """Return all keys of all chosen databases, labeled with their category.

        From a database that breaks part-way, what can still be read is listed, and the listing is marked as damaged.
        """
        listing = Listing({"class": "str"})
        for path in self._databases():
            category = _split_name(path)[0]
            keys, stated = _keys(path)
            if not stated:
                listing.notes.append(f"{path.name} is empty")
            listing.items.extend(Item(f"{path.name}/{key}", (category,), None) for key in keys)
            if lost := stated - len(keys):
                listing.refused.unnamed[f"lost in the damaged database {path.name}"] = lost
                listing.damaged = True
        if not listing.items:
            raise DataError(f"{self.location}: its databases hold no images")
        return listing

    def read(self, item: Item) -> bytes:
        """Return the encoded image: JPEG or WebP, whichever the exporter wrote."""
        import lmdb

        name, _, key = item.key.partition("/")
        path = next(path for path in self._databases() if path.name == name)
        try:
            with _open(str(path)).begin(buffers=False) as transaction:
                value: bytes | None = transaction.get(key.encode("utf-8", "surrogateescape"))
        except lmdb.Error as error:
            raise BadImage(f"damaged database ({type(error).__name__})") from None
        if value is None:
            raise BadImage("damaged database (key not found)")
        return value

    def _databases(self) -> list[Path]:
        if is_url(self.location):
            raise UsageError(f"{self.location}: lsun reads local folders only (lmdb maps its file); copy it to a disk")
        root = Path(self.location)
        if not root.is_dir():
            raise UsageError(f"{self.location}: no such folder; expected an LSUN folder such as bedroom_train_lmdb")
        found = [root] if (root / "data.mdb").is_file() else sorted(p.parent for p in root.glob("*/data.mdb"))
        if not found:
            raise DataError(f"{self.location}: no data.mdb here or one folder down; expected an LSUN lmdb folder")
        chosen = [
            path
            for path in found
            if (not self.categories or _split_name(path)[0] in self.categories)
            and (self.split is None or _split_name(path)[1] == self.split)
        ]
        known = {_split_name(path)[0] for path in found}
        if missing := [name for name in self.categories if name not in known]:
            raise UsageError(f"--category {missing[0]}: not in {self.location}, which has {', '.join(sorted(known))}")
        if not chosen:
            raise UsageError(
                f"--split {self.split}: no such database in {self.location}: {', '.join(p.name for p in found)}"
            )
        return chosen


def _split_name(path: Path) -> tuple[str, str | None]:
    match = _NAME.fullmatch(path.resolve().name)
    return (match["category"], match["split"]) if match else (path.name, None)


@functools.lru_cache(maxsize=64)
def _open(path: str) -> Any:
    try:
        import lmdb
    except ImportError:
        raise UnavailableError("reading LSUN needs the package lmdb: pip install 'dcgan-pipeline[data]'") from None
    try:
        environment = lmdb.open(path, readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise DataError(f"{path}: not a readable lmdb database: {error}") from None
    stated = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    size = (Path(path) / "data.mdb").stat().st_size
    if size < stated:  # reading on would be a bus error: the file is mapped into memory
        raise DataError(f"{path}/data.mdb: cut off: {size:,} of {stated:,} bytes; copy it again")
    return environment


def _keys(path: Path) -> tuple[list[str], int]:
    """Return the keys that can be read, and the number that the database states."""
    stated = int(_open(str(path)).stat()["entries"])
    keys: list[str] = []
    start, stride = 0, 1  # in 1/65536 of the keys, which are uniform hex numbers
    while stated and start < 1 << 16:
        command = [sys.executable, "-m", "pipeline.data.sources.lsun_keys", str(path), f"{start:04x}"]
        before = len(keys)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as reader:
            assert reader.stdout is not None
            keys += (line[:-1].decode("utf-8", "surrogateescape") for line in reader.stdout if line.endswith(b"\n"))
        if reader.returncode == 0:
            break
        # Step over the broken page, twice as far each time, until there are keys again.
        stride = 1 if len(keys) > before else 2 * stride
        start = max(start, _position(keys[-1]) if keys else 0) + stride
    return keys, stated


def _position(key: str) -> int:
    """Return where in the key space a key lies, in 1/65536."""
    try:
        return int(key[:4], 16)
    except ValueError:
        return 1 << 16
