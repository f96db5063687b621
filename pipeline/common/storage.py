"""Reading and writing files, the same on a disk and in an object store: retries, time limits, atomic output.

The one mechanism for both (docs/architecture.md, contract 9). A location is a directory, or the URL of a folder
(`http(s)://`, `s3://`, `gs://`, `hf://`, `file://`); names inside it use forward slashes.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from pipeline.common.errors import DataError, TryAgainError, UnavailableError, UsageError, describe_os_error
from pipeline.common.store_errors import credentials_expired, refusal, renew_credentials

SCHEMES = ("http", "https", "s3", "gs", "hf", "file", "memory")
PAUSES_SECONDS = (0.5, 2.0, 5.0, 15.0)
"""Pauses between two attempts at a store; there is one attempt more than there are pauses."""
TIMEOUT_SECONDS = 60.0
"""Longest silence of a store within an answer."""
CONNECT_SECONDS = 10.0
"""Longest wait for a connection."""
MOST_CONNECTIONS = 64
"""Connections of a process to an S3 store at once; botocore's own 10 would hold up the loader's threads."""
PATIENCE_SECONDS = sum(PAUSES_SECONDS) + (len(PAUSES_SECONDS) + 1) * (CONNECT_SECONDS + TIMEOUT_SECONDS)
"""Time until a store that says nothing at all has failed for good: six minutes."""
UMASK = os.umask(0o022)
os.umask(UMASK)
"""Read once, here: it can only be read by changing it, and another thread may make a file meanwhile."""
TEMPORARY = ".tmp"
"""Suffix of a file that is being written."""

log = logging.getLogger(__name__)

T = TypeVar("T")


def is_url(location: str | os.PathLike[str]) -> bool:
    """Whether `location` is a URL rather than a path. Raises UsageError for a scheme that is not allowed."""
    text = os.fspath(location)
    if text.startswith("pipe:"):
        raise UsageError(f"{text}: pipe: is refused, because it would run a shell command; name the file or its URL")
    if (match := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)) is None:
        return False
    if (scheme := match[1].lower()) not in SCHEMES:
        raise UsageError(f"{text}: URLs of kind {scheme!r} are refused; expected {', '.join(SCHEMES)}")
    return True


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`, else remove it.

    Folders that are missing are made, and go with it: an error leaves nothing. Without `durable` nothing is fsynced:
    for files that their readers verify, and can have again.
    """
    with made_directory(path.parent):
        handle, name = _temporary(path)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~UMASK)
            if durable:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
            temporary.replace(path)
            if durable:
                fsync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(handle)


def _temporary(path: Path) -> tuple[int, str]:
    """Return a new file beside `path`, locked for as long as its descriptor is open: `remove_abandoned` spares it."""
    while True:
        try:
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
        except FileNotFoundError:  # another writer made the folder, failed, and has just removed it again
            if path.parent.is_dir():
                raise
            make_directory(path.parent)
            continue
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)  # taken for abandoned before it was locked


def remove_abandoned(directory: Path) -> None:
    """Remove the temporary files that killed processes left in `directory`; those being written stay."""
    for path in directory.glob(f".*{TEMPORARY}"):
        with suppress(OSError):
            # Neither through a link, nor waiting for the other end of a pipe.
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(handle, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def write_atomic(path: Path, data: bytes | str | Iterable[bytes | memoryview]) -> None:
    """Write `data`, or its pieces, to `path` so that a crash leaves either the old file or the new one."""
    with atomic_path(path) as temporary:
        if isinstance(data, bytes | str):
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
            return
        with temporary.open("wb", buffering=0) as file:
            for piece in data:
                rest = memoryview(piece)
                while rest:
                    rest = rest[file.write(rest) :]


def spare_bytes(folder: Path) -> int:
    """Return what a cache in `folder` may still take of its volume; it is negative where others have filled it.

    A twentieth of the volume, at most 1 GiB, stays free: no cache fills the disk on which others write what they need.
    """
    there = next(path for path in (folder, *folder.parents, Path()) if path.is_dir())
    usage = shutil.disk_usage(there)
    return usage.free - min(usage.total // 20, 1 << 30)


def make_directory(path: Path) -> list[Path]:
    """Create `path` and its parents so that they outlive a crash: a file is safe only when its folders are.

    Returns those that were missing, the innermost first. An error leaves none of them.
    """
    if path.is_dir():
        return []
    made = make_directory(path.parent)
    try:
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)
    except BaseException:
        remove_empty(path, *made)
        raise
    return [path, *made]


def remove_empty(*folders: Path) -> None:
    """Remove those of `folders` that are there and empty, in this order."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def made_directory(path: Path) -> Iterator[None]:
    """Create `path` and its parents; after an error, remove again those that were missing and are still empty."""
    made = make_directory(path)
    try:
        yield
    except BaseException:
        remove_empty(*made)
        raise


def require_writable(location: str | os.PathLike[str]) -> None:
    """Raise what writing into the folder `location` would raise, before the work; leave nothing there.

    The folder need not exist. Whether an object store can be written shows only in the first write.
    """
    if is_url(location := os.fspath(location).removeprefix("file://")):
        if location.startswith(("http://", "https://")):
            raise UsageError(f"{location}: an http server is only read; choose a folder, s3:// or gs://")
        return
    path = Path(location)
    there = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    try:
        tempfile.TemporaryFile(dir=there).close()  # without a name, where the system supports that
    except OSError as error:
        error.filename = str(path)
        raise


def fsync_directory(path: Path) -> None:
    """Make renames and removals inside `path` durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_bytes(data: bytes | memoryview) -> str:
    """Return the hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_plain_name(name: str) -> bool:
    """Whether `name` is safe as one component of a path: what every name must be that a file of ours gives."""
    return re.fullmatch(r"[A-Za-z0-9_.-]{1,255}", name) is not None and name.strip(".") != ""


def require_plain_name(name: str, where: str) -> str:
    """Return `name`, which a file or a store gave, if it is safe as one component of a path; else raise DataError."""
    if not is_plain_name(name):
        raise DataError(f"{where}: names the file {name!r}; expected a plain name: it is damaged, or not ours")
    return name


def public_name(location: str | os.PathLike[str]) -> str:
    """Return `location` as files that travel state it: without what it tells of this machine and its user.

    Of a path that is the last part; of a URL everything but user, password and query.
    """
    text = os.fspath(location)
    if "::" in text:  # a shard specification of several
        return "::".join(map(public_name, text.split("::")))
    if "://" in text and not text.startswith("file://"):
        with suppress(ValueError):
            parts = urlsplit(text)
            return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    return os.path.basename(os.path.abspath(text.removeprefix("file://")))


def locate(reference: str) -> tuple["Store", str]:
    """Return the store and the name of the file that a path or URL means."""
    folder, slash, name = reference.rpartition("/")
    return Store(folder or ("/" if slash else ".")), name


def open_ranges(reference: str) -> Callable[[int, int], bytes]:
    """Return `Store.ranges` of a path or URL: opened once, not once a picture, and again when its file was replaced."""
    path = reference.removeprefix("file://")
    return _open_ranges(path, None if is_url(path) else os.stat(path).st_ino)


@lru_cache(maxsize=256)
def _open_ranges(reference: str, inode: int | None) -> Callable[[int, int], bytes]:
    store, name = locate(reference)
    return store.ranges(name)


class _OpenFile:
    """A file of a disk, open to be read by several threads until nothing refers to it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


@dataclass(frozen=True)
class FileFacts:
    """What a store says of a file."""

    bytes: int | None
    """Its size; None where the store does not say."""
    etag: str | None
    """Its ETag, which changes with its content; None on a disk, and where the store has none."""
    ranges: bool
    """Whether a part of it can be read without the rest."""


class Store:
    """A directory or URL whose files are read whole and written atomically.

    Every error becomes a UserError that names the file: DataError when it is not there or not allowed,
    TryAgainError when the store does not answer, or cuts its answers off, for longer than `PAUSES_SECONDS`.

    No name leads out of the location: one that says so (`..`, a leading slash) is refused, and so is writing and
    deleting through a link that leads out. Reading follows links, because people link their files; for a name that a
    file gave, `inside` refuses them too.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.location = os.fspath(location).removeprefix("file://").rstrip("/") or "/"
        self.remote = is_url(self.location)
        self._fs: Any = None
        self._root = self.location
        if self.remote:
            self._fs, self._root = _filesystem(self.location)

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        """Travel to other processes as a location: each opens connections of its own."""
        return Store, (self.location,)

    def path(self, name: str) -> str:
        """Return the full path or URL of `name`, for messages."""
        return f"{self.location}/{name}"

    def inside(self, name: str) -> str:
        """Return `name`, which a file or a listing gave. Raises DataError when it, or a link, leads out of here."""
        _refuse_path(name, self.location)
        if self.remote:
            return name
        here = self.location
        for part in name.split("/"):
            here = f"{here}/{part}"
            if os.path.islink(here):
                break
        else:
            return name
        root, real = os.path.realpath(self.location), os.path.realpath(f"{self.location}/{name}")
        if real != root and not real.startswith(f"{root.rstrip('/')}/"):
            raise DataError(
                f"{here}: a link that leads out of {self.location}, to {real}; put the files themselves there"
            )
        return name

    def writable(self, name: str) -> Path:
        """Return the path of `name` on this disk, to write or delete it. Raises DataError as `inside` does.

        A link in its place is replaced or removed itself, so only the folders above it count.
        """
        _refuse_path(name, self.location)
        if folder := name.rpartition("/")[0]:
            self.inside(folder)
        return Path(self.location) / name

    def shown(self, name: str) -> str:
        """Return a listed `name` as people write it: http servers list, and are asked for, percent-encoded names."""
        return unquote(name, errors="surrogateescape") if self.location.startswith(("http://", "https://")) else name

    def read(self, name: str) -> bytes:
        """Return the content of `name`."""
        _refuse_path(name, self.location)
        if not self.remote:
            path = Path(self.location) / name
            with suppress(FileNotFoundError):  # another process has just removed it
                if path.is_file():  # no named pipe: it would never end
                    return path.read_bytes()
            raise DataError(f"{self.path(name)}: no such file")
        data: bytes = self._retry(name, lambda: self._fs.cat_file(f"{self._root}/{name}"))
        return data

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Return `size` bytes of `name` from `offset` on. Raises DataError when the file ends before."""
        return self.ranges(name)(offset, size)

    def ranges(self, name: str) -> Callable[[int, int], bytes]:
        """Return what reads (offset, size) of `name`, as `read_range` does. On a disk it keeps the file open."""
        _refuse_path(name, self.location)
        file = None if self.remote else _OpenFile(Path(self.location) / name)

        def read(offset: int, size: int) -> bytes:
            if file is not None:
                data = os.pread(file.descriptor, size, offset)
            else:
                end = offset + size
                path = f"{self._root}/{name}"
                data = self._retry(name, lambda: self._fs.cat_file(path, start=offset, end=end))
                if len(data) > size:  # a server without range requests sends the whole file
                    data = data[offset:end]
            if len(data) != size:
                raise DataError(f"{self.path(name)}: ends before offset {offset + size}")
            return data

        return read

    def facts(self, name: str) -> "FileFacts":
        """Return what the store says of the file `name`. Raises DataError when it is not there."""
        if not self.remote:
            try:
                return FileFacts((Path(self.location) / name).stat().st_size, None, True)
            except (FileNotFoundError, NotADirectoryError):
                raise DataError(f"{self.path(name)}: no such file") from None

        def look() -> FileFacts:
            # First a read: over http, `info` calls a store that is away a missing file.
            path = f"{self._root}/{name}"
            try:
                first = self._fs.cat_file(path, start=0, end=1)
            except Exception as error:
                if _is_empty(error):
                    return FileFacts(0, None, True)
                raise
            self._fs.invalidate_cache()
            try:
                info = self._fs.info(path)
            except FileNotFoundError as error:
                raise OSError(f"it was there and is not: {error}") from None
            etag = next((str(info[key]) for key in ("ETag", "etag", "blob_id") if info.get(key)), None)
            return FileFacts(info.get("size"), etag, len(first) <= 1 and info.get("partial") is not False)

        return self._retry(name, look)

    def fetch(self, name: str, path: Path) -> None:
        """Download `name` of a remote store to the local file `path`, whole, without holding it in memory."""
        _refuse_path(name, self.location)
        self._retry(name, lambda: self._fs.get_file(f"{self._root}/{name}", str(path)))

    def write(self, name: str, data: bytes | Sequence[bytes | memoryview]) -> None:
        """Write `name` so that readers see all of `data`, given whole or in pieces, or nothing."""
        if self.remote:
            _refuse_path(name, self.location)
            data = data if isinstance(data, bytes) else b"".join(data)
            self._retry(name, lambda: self._fs.pipe_file(f"{self._root}/{name}", data))
        else:
            write_atomic(self.writable(name), data)

    @contextmanager
    def made(self, folder: str = "") -> Iterator[None]:
        """Make `folder`; after an error, remove it again if it was missing and is empty. A store has no folders."""
        with nullcontext() if self.remote else made_directory(Path(self.location) / folder):
            yield

    def write_all(self, files: Mapping[str, bytes | Sequence[bytes | memoryview]]) -> None:
        """Write files of which the last commits the others. After an error, those that are new do not stay on a disk.

        In an object store they do: one that fails would fail for minutes more.
        """
        with ExitStack() as stack:
            for folder in dict.fromkeys(name.rpartition("/")[0] for name in files):
                stack.enter_context(self.made(folder))
            new = [name for name in files if not self.remote and not self.exists(name)]
            try:
                for name, data in files.items():
                    self.write(name, data)
            except BaseException:
                for name in new:
                    self.delete(name)
                raise

    def exists(self, name: str) -> bool:
        """Whether `name` is there."""
        _refuse_path(name, self.location)
        if not self.remote:
            return (Path(self.location) / name).exists()

        def look() -> bool:
            # fsspec's `exists` and `info` over http call a store that is away a missing file; a read does not.
            try:
                self._fs.cat_file(f"{self._root}/{name}", start=0, end=1)
            except FileNotFoundError:
                return False
            except Exception as error:
                if _is_empty(error):
                    return True
                raise
            return True

        return self._retry(name, look)

    def names(self, folder: str = "") -> list[str]:
        """Return the names of the files and folders in `folder`, sorted; empty if there is no such folder."""
        _refuse_path(folder, self.location)
        if not self.remote:
            with suppress(FileNotFoundError, NotADirectoryError):
                return sorted(os.listdir(Path(self.location) / folder))
            return []

        def listing() -> list[str]:
            try:
                self._fs.invalidate_cache()
                found = self._fs.ls(f"{self._root}/{folder}".rstrip("/"), detail=False)
            except FileNotFoundError:
                return []
            names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in found)
            return sorted(name for name in names if name not in ("", ".", ".."))

        return self._retry(folder, listing)

    def sizes(self) -> dict[str, int | None]:
        """Return the bytes of each file by its name, of one listing; None where the store does not say."""
        if not self.remote:
            sizes: dict[str, int | None] = {}
            for path in Path(self.location).iterdir() if Path(self.location).is_dir() else ():
                with suppress(FileNotFoundError):  # gone meanwhile
                    sizes |= {path.name: path.stat().st_size} if path.is_file() else {}
            return sizes

        def listing() -> dict[str, int | None]:
            try:
                self._fs.invalidate_cache()
                found = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:
                return {}
            files = [entry for entry in found if entry["type"] != "directory"]
            return {entry["name"].rsplit("/", 1)[-1]: entry.get("size") for entry in files}

        return self._retry("", listing)

    def find(self, folder: str = "") -> list[tuple[str, int]]:
        """Return (name, bytes) of all files below `folder` of an object store, sorted; 0 bytes where unknown."""
        root = f"{self._root}/{folder}".rstrip("/")

        def listing() -> list[tuple[str, int]]:
            self._fs.invalidate_cache()
            found = self._fs.find(root, detail=True)
            start = len(self._root) + 1
            return sorted((name[start:], int(entry.get("size") or 0)) for name, entry in found.items())

        found = self._retry(folder, listing)
        for name, _ in found:
            _refuse_path(name, self.location)
        return found

    def delete(self, name: str) -> None:
        """Remove the file or folder `name` for good; nothing happens if it is not there."""
        _refuse_path(name, self.location)
        if self.remote:

            def remove() -> None:
                with suppress(FileNotFoundError):
                    self._fs.rm(f"{self._root}/{name}", recursive=True)

            self._retry(name, remove)
            return
        import shutil

        path = self.writable(name)
        while path.exists() or path.is_symlink():
            with suppress(FileNotFoundError):  # another process removes it, too
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                fsync_directory(path.parent)

    def remove_abandoned(self, folder: str = "") -> None:
        """Remove what killed processes left half-written in `folder`; an object store keeps no such files."""
        if not self.remote:
            remove_abandoned(Path(self.location) / self.inside(folder))

    def _retry(self, name: str, action: Callable[[], T]) -> T:
        """Run `action`, again after passing faults with growing pauses; turn what remains into a UserError."""
        expired = 0
        for pause in (*PAUSES_SECONDS, None):
            try:
                return action()
            except Exception as error:
                if isinstance(error, OSError) and error.errno in _LOCAL_FAULTS and error.filename:
                    raise describe_os_error(error) from None
                renewed = False
                if credentials_expired(error):
                    expired += 1
                    # Those that nobody has renewed by the last attempt are a refusal like any other.
                    renewed = (pause is not None or expired == 1) and renew_credentials(self._fs)
                if not renewed and (words := refusal(error)) is not None:
                    raise DataError(f"{self.path(name)}: {words}") from None
                fault = f"{type(error).__name__}: {error}".rstrip(": ")
            if pause is not None:
                log.warning("%s: %s; retrying in %g s", self.path(name), fault, pause)
                time.sleep(pause)
        raise TryAgainError(
            f"{self.path(name)}: the store failed {len(PAUSES_SECONDS) + 1} times, last with {fault}. "
            "Run the same command again when it answers: it resumes"
        )


def _refuse_path(name: str, location: str) -> None:
    """Raise DataError for a name that is not below `location`, whatever is there."""
    if name.startswith("/") or "\0" in name or ".." in name.split("/"):
        raise DataError(f"{location}: {name!r} names a file outside of it: it is damaged, or not ours")


_LOCAL_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def _is_empty(error: Exception) -> bool:
    """Whether a store refused to read the first byte of a file because it has none."""
    return "InvalidRange" in str(error.__cause__) or getattr(error, "status", None) == 416


def _filesystem(location: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of a URL and the path inside it."""
    import fsspec

    scheme = urlsplit(location).scheme
    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        import aiohttp

        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=TIMEOUT_SECONDS)
        }
    elif scheme == "s3":
        # Tries are counted in one place, `Store._retry`: botocore and s3fs would each multiply them by five.
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": TIMEOUT_SECONDS,
            "max_pool_connections": MOST_CONNECTIONS,
            "retries": {"total_max_attempts": 1},
        }
    elif scheme == "gs":
        import aiohttp

        options["requests_timeout"] = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=TIMEOUT_SECONDS
        )
        # Otherwise gcsfs first asks over gRPC what kind of bucket it is, which proxies and compatible stores cannot
        # answer: a minute for each file.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        filesystem, root = fsspec.core.url_to_fs(location, **options)
    except ImportError as error:
        raise UnavailableError(
            f"{location}: reading {scheme}:// needs a package that is not installed: {error}"
        ) from None
    if scheme == "s3":
        filesystem.retries = 1
        # With more, it asks for a file's size first: a request more for each file, and one whose error has no code.
        filesystem.max_concurrency = 1
    elif scheme == "gs":
        # It would try six times within each of ours, and log a traceback after the last.
        for name in ("_request", "_get_file_request", "_get_file_concurrent"):
            method = getattr(type(filesystem), name)
            setattr(filesystem, name, MethodType(getattr(method, "__wrapped__", method), filesystem))
    return filesystem, root
