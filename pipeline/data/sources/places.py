"""Where the files of a source lie: a folder, an object store, or an archive that is read as if it were a folder."""

import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath

from pipeline.common.errors import UnavailableError, UsageError
from pipeline.common.imaging import BadImage
from pipeline.common.pictures.formats import HEAD_BYTES, advice, is_enabled, kind_of, missing_format, picture_suffixes
from pipeline.common.storage import Store, is_url
from pipeline.data.sources.archives.members import LARGEST_FILE, Member, find_members, is_archive, read_member, stem
from pipeline.data.sources.interface import Listing

MACHINE_MADE = {"@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "#recycle", "@Recycle"}
"""Folders that file servers and systems make; what lies in them is nobody's."""
LOOPS = "links that lead back to a folder above them"

Place = int | str | Member
"""Where a file is, beside its path: its size; its path as an http server spells it; its place in an archive."""
File = tuple[str, Place]


def find_files(location: str, listing: Listing) -> Iterator[File]:
    """Yield the files at a location, in any order, without hidden ones and without folders that machines make.

    What is passed over is counted in `listing`, and what an archive cannot give is refused there. Of an archive whose
    files all lie in one folder, paths begin below that. An archive in a folder without pictures is a folder itself.
    """
    archive = is_archive(location) or (not is_url(location) and Path(location).is_file())
    if archive:
        yield from _in_archive(location, "", listing)
        return
    if is_url(location):
        store = Store(location)
        listed = ((store.shown(path), path, size) for path, size in store.find())
        found: Iterable[File] = ((shown, size if shown == path else path) for shown, path, size in listed)
    elif not Path(location).is_dir():
        raise UsageError(f"{location}: no such folder or archive; SRC holds the images")
    else:
        found = _walk(Path(location), listing)
    archives: list[File] = []
    pictures = False
    for path, place in found:
        if not _is_kept(path, listing):
            continue
        if is_archive(path):
            archives.append((path, place))
            continue
        pictures = pictures or _suffix(path) in picture_suffixes()
        yield path, place
    for path, place in sorted(archives, key=lambda file: file[0]):
        if pictures:
            listing.passed[f"{_suffix(path)} beside pictures (name one as SRC to read it)"] += 1
        else:
            spelled = place if isinstance(place, str) else path
            yield from _in_archive(f"{location.rstrip('/')}/{spelled}", f"{stem(path)}/", listing)


def find_pictures(
    location: str,
    listing: Listing,
    *,
    all_files: bool = False,
    others: Callable[[File], None] = lambda file: None,
    named: Collection[str] = (),
) -> Iterator[File]:
    """Yield the pictures at a location like `find_files`: by their suffix, and other files by their first bytes.

    In a store that costs a request for each other file, and is done with `all_files` only. What is no picture is
    counted by kind; those with a name in `named` are given to `others` instead.
    """
    look = all_files or not is_url(location)
    suffixes = picture_suffixes()
    for path, place in find_files(location, listing):
        suffix = _suffix(path)
        if suffix in suffixes:
            yield path, place
        elif path.rpartition("/")[2] in named:
            others((path, place))
        elif (kind := missing_format(suffix)) is not None:
            listing.passed[f"{suffix} ({advice(kind)})"] += 1
        elif look and (kind := kind_of(_head(location, path, place))) is not None:
            if is_enabled(kind):
                yield path, place
            else:
                listing.passed[f"{kind} ({advice(kind)})"] += 1
        else:
            listing.passed[suffix or "without a suffix"] += 1


def refuse_missing_formats(location: str, listing: Listing) -> None:
    """Raise UnavailableError when pictures were passed over because a package is not installed."""
    for kind, number in listing.passed.items():
        if "pip install" in kind:
            raise UnavailableError(f"{location}: {number:,} pictures, but they are {kind}")


def read_place(location: str, path: str, place: Place) -> bytes:
    """Return a file of `find_files`. Raises BadImage when only this file cannot be read."""
    if isinstance(place, Member):
        return read_member(place)
    return read_file(location, place if isinstance(place, str) else path)


def read_file(location: str, path: str) -> bytes:
    """Return a file below `location`. Raises BadImage when only this file cannot be read."""
    try:
        if is_url(location):
            return Store(location).read(path)
        with (Path(location) / path).open("rb") as file:
            if os.fstat(file.fileno()).st_size > LARGEST_FILE:
                raise BadImage("too large a file")
            return file.read()
    except PermissionError:
        raise BadImage("no permission to read it") from None
    except FileNotFoundError:
        raise BadImage("a link to nothing, or removed meanwhile") from None


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def _head(location: str, path: str, place: Place) -> bytes:
    """Return the first bytes of a file, or none where it cannot be read."""
    try:
        if isinstance(place, Member):
            return read_member(place, HEAD_BYTES)
        if is_url(location):
            return Store(location).read(place if isinstance(place, str) else path)[:HEAD_BYTES]
        with (Path(location) / path).open("rb") as file:
            return file.read(HEAD_BYTES)
    except (BadImage, OSError):
        return b""


def _is_kept(path: str, listing: Listing) -> bool:
    """Whether a file is neither hidden nor in a folder that a machine made; count those that are."""
    *folders, name = path.split("/")
    if name.startswith(".") or any(folder.startswith(".") and folder not in (".", "..") for folder in folders):
        return False
    if made := next((folder for folder in folders if folder in MACHINE_MADE), None):
        listing.passed[f"in {made}"] += 1
        return False
    return True


def _in_archive(location: str, prefix: str, listing: Listing) -> Iterator[File]:
    found = [(path, member) for path, member in find_members(location, listing) if _is_kept(path, listing)]
    first = found[0][0].split("/")[:-1] if found else []
    depth = len(first)
    for path, _ in found:
        folders = path.split("/")[:-1]
        depth = min(depth, len(folders))
        while folders[:depth] != first[:depth]:
            depth -= 1
    for path, member in found:
        yield prefix + "/".join(path.split("/")[depth:]), member


def _walk(root: Path, listing: Listing) -> Iterator[tuple[str, int]]:
    """Yield (path below root, bytes) of all files that are not hidden, through links; count the links in a circle."""
    top = root.stat()
    # Each entry: the folder, its path below the root, and the folders above it, by which loops are known.
    pending = [(str(root), "", frozenset([(top.st_dev, top.st_ino)]))]
    while pending:
        folder, prefix, above = pending.pop()
        with os.scandir(folder) as entries:  # a folder without permission is an error: its images would be missed
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    status = entry.stat()
                except OSError:  # a link to nothing: reported with its name when it is read
                    yield prefix + entry.name, 0
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield prefix + entry.name, status.st_size
                elif entry.name in MACHINE_MADE:
                    listing.passed[f"folder {entry.name}"] += 1
                elif stat.S_ISDIR(status.st_mode):
                    identity = (status.st_dev, status.st_ino)
                    if identity in above:
                        listing.passed[LOOPS] += 1
                    else:
                        pending.append((entry.path, f"{prefix}{entry.name}/", above | {identity}))
