"""A disk that loses power: each write, fsync, rename, mkdir or unlink can be the last; what was not synced is lost.

The operations are Python's own on a real folder. Beside it the layer keeps what a strict file system would have made
durable: a file's bytes at its last fsync, a folder's entries at the folder's last fsync.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

Loss = Literal["nothing", "everything unsynced", "unsynced bytes only"]
LOSSES: tuple[Loss, ...] = ("nothing", "everything unsynced", "unsynced bytes only")


class PowerCut(BaseException):
    """The machine stops here. Not an Exception: nothing may handle it."""


class CrashingDisk:
    """Watches all changes below `root`, and stops the machine at operation number `crash_at`, counted from 0."""

    def __init__(self, root: Path, crash_at: int | None = None) -> None:
        self.root = root
        self.crash_at = crash_at
        self.operations: list[str] = []
        self.off = False
        self._synced: dict[int, bytes] = {}  # inode -> bytes
        self._entries: dict[str, dict[str, int | None]] = {}  # folder -> name -> inode, None for a folder
        self._sync_folder(root)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Route the operations of this process through the disk."""
        names = ("fsync", "replace", "rename", "mkdir", "unlink", "remove", "rmdir")
        before: dict[str, Any] = {name: getattr(os, name) for name in names}
        write_bytes = Path.write_bytes

        def fsync(handle: int) -> None:
            path = os.readlink(f"/proc/self/fd/{handle}")
            if self._count("fsync", path):
                before["fsync"](handle)
                if os.path.isdir(path):
                    self._sync_folder(Path(path))
                else:
                    self._synced[os.fstat(handle).st_ino] = Path(path).read_bytes()

        def wrap(name: str) -> Any:
            def operation(path: Any, *args: Any, **options: Any) -> Any:
                folder = options.get("dir_fd")
                where = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path) if folder is not None else path
                if self._count(name, os.fspath(where)):
                    return before[name](path, *args, **options)
                return None

            return operation

        def write(path: Path, data: bytes) -> int:
            if self.crash_at == len(self.operations) and not self.off:
                write_bytes(path, data[: len(data) // 2])  # the cut comes in the middle of it
            self._count("write", str(path))
            return write_bytes(path, data)

        try:
            for name in names:
                setattr(os, name, fsync if name == "fsync" else wrap(name))
            Path.write_bytes = write  # type: ignore[method-assign,assignment]
            yield
        finally:
            for name, operation in before.items():
                setattr(os, name, operation)
            Path.write_bytes = write_bytes  # type: ignore[method-assign]

    def after_reboot(self, target: Path, loss: Loss) -> Path:
        """Write what the next boot finds to `target`."""
        if loss == "everything unsynced":
            self._restore(str(self.root), target)
            return target
        shutil.copytree(self.root, target)
        if loss == "unsynced bytes only":
            for path in self.root.rglob("*"):
                if path.is_file() and self._synced.get(path.stat().st_ino) != path.read_bytes():
                    copy = target / path.relative_to(self.root)
                    copy.write_bytes(b"\0" * (path.stat().st_size // 2))
        return target

    def _count(self, operation: str, path: str) -> bool:
        """Whether the operation happens. Raises PowerCut when the machine stops, or has stopped."""
        if not path.startswith(str(self.root)):
            return True
        if self.off or self.crash_at == len(self.operations):
            self.off = True
            raise PowerCut(f"{operation} {path}")
        self.operations.append(f"{operation} {os.path.relpath(path, self.root)}")
        return True

    def _sync_folder(self, folder: Path) -> None:
        self._entries[str(folder)] = {
            entry.name: None if entry.is_dir() else entry.stat().st_ino for entry in folder.iterdir()
        }

    def _restore(self, folder: str, target: Path) -> None:
        target.mkdir(parents=True)
        for name, inode in self._entries.get(folder, {}).items():
            if inode is None:
                self._restore(f"{folder}/{name}", target / name)
            else:
                (target / name).write_bytes(self._synced.get(inode, b""))
