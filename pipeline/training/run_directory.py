"""RUN/: the files that a run writes, and the lock that keeps a second trainer out."""

import fcntl
import json
import logging
import math
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any

from pipeline.checkpoints.weights import INIT_FROM
from pipeline.common.errors import DataError, TryAgainError
from pipeline.common.imaging import decode
from pipeline.common.machine import available_cores
from pipeline.common.records import LARGEST, parse_json
from pipeline.common.storage import (
    Store,
    is_url,
    locate,
    make_directory,
    remove_abandoned,
    remove_empty,
    write_atomic,
)
from pipeline.config import NetworkConfig
from pipeline.data.dataset import DATASET_FILE
from pipeline.data.index.indexer import REMOTE_TARS, make_index
from pipeline.data.index.reader import opened
from pipeline.data.index.samples import index_tar
from pipeline.data.specification import expand, is_specification
from pipeline.training.accelerator import from_main

if TYPE_CHECKING:
    from accelerate import Accelerator

INDEX = "index"
"""Folder of the index that a run makes of the tars that `--data` names."""
LOCK_PATIENCE_SECONDS = 30.0
LOCATION = ".data"
"""The file that says where the run's data set lies. It belongs to this machine: nothing copies or publishes it."""
CONFIG = "config.json"
FILES = (LOCATION, "log.txt", CONFIG, "metrics.jsonl", "timing.jsonl")
FOLDERS = ("samples", "tensorboard")
"""What a run writes besides its checkpoints."""

log = logging.getLogger(__name__)


@contextmanager
def indexed(data: str, out: Path, network: NetworkConfig, accelerator: "Accelerator") -> Iterator[str]:
    """Yield where the run's data set is: `data`, or the index of the tars that it names.

    The main process makes the index in OUT/index, or finds it there. The others, which may be on other machines, get
    a copy. Raises what `expand` and `make_index` raise, on all ranks.
    """
    files = from_main(accelerator, lambda: _index(data, out, network))
    if files is None:
        yield data
    elif accelerator.is_main_process:
        yield str(out / INDEX)
    else:
        with TemporaryDirectory(prefix="dcgan-index-") as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            yield folder


def _index(data: str, out: Path, network: NetworkConfig) -> dict[str, bytes] | None:
    """Return the files of the index of the tars that `data` names; None if it names a data set."""
    if not is_specification(data):
        return None
    tars = [tar if is_url(tar) else os.path.abspath(tar) for tar in expand(data)]
    if not (out / INDEX / DATASET_FILE).exists():
        log.info("indexing %d tars into %s, about %.0f s", len(tars), out / INDEX, _estimate_seconds(tars))
    dataset = make_index(tars, str(out / INDEX), spec=data, size=network.image_size, channels=network.channels)
    assert dataset is not None
    assert dataset.index is not None
    return {name: dataset.store.read(name) for name in (DATASET_FILE, dataset.index.name)}


def _estimate_seconds(tars: list[str]) -> float:
    """Return how long it takes to index some tars, from the time that one of them takes."""
    middle = tars[len(tars) // 2]
    began = time.monotonic()
    with opened(*locate(middle)) as tar:
        index_tar(tar, middle, min_side=1)
    at_once = available_cores() * (REMOTE_TARS if is_url(middle) else 1)
    return (time.monotonic() - began) * -(-len(tars) // at_once)


class RunDirectory:
    """Owned by the main process of a run. `metrics.jsonl` follows from position; `timing.jsonl` does not.

    A run exists from its first record on. What fails before that leaves no file or folder that was not there.
    """

    def __init__(self, path: Path, location: str = "") -> None:
        """`location` is the data set's, a path or a URL."""
        self.path = path
        self._location = location if "://" in location else str(Path(location).resolve())
        self.metrics = path / "metrics.jsonl"
        self.timing = path / "timing.jsonl"
        self._new = make_directory(path)
        try:
            for name in (".lock", *FILES, *FOLDERS):
                Store(path).inside(name)  # a run directory of others may link what this writes to files of ours
            self._lock = _lock(path / ".lock")
            early = [path / name for name in (*FILES, *FOLDERS, "checkpoints")]
            unsigned = [path / ".lock"] if not os.fstat(self._lock.fileno()).st_size else []
            self._new = unsigned + [entry for entry in early if not entry.exists()] + self._new
            _sign(self._lock)
        except BaseException:
            self._withdraw()
            raise
        for folder in (path, path / "samples"):
            remove_abandoned(folder)
        self._log = logging.FileHandler(path / "log.txt", delay=True)
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("pipeline").addHandler(self._log)
        self._board: Any = None

    def write_config(self, content: dict[str, Any]) -> int:
        """Write config.json, which also counts how often the run was started; return that."""
        path = self.path / CONFIG
        try:
            before = parse_json(path.read_bytes(), str(path))
        except (OSError, DataError):
            before = None
        known = before.get("starts") if isinstance(before, dict) else None
        starts = known + 1 if type(known) is int and 0 < known < LARGEST else 1
        write_atomic(self.path / LOCATION, f"{self._location}\n")
        write_atomic(path, json.dumps({**content, "starts": starts}, indent=1) + "\n")
        return starts

    def restore_metrics(self, content: Iterable[bytes]) -> None:
        """Put metrics.jsonl back to what it was at a checkpoint, given in pieces."""
        write_atomic(self.metrics, content)

    def open_board(self, images_seen: int) -> None:
        """Begin TensorBoard files, and hide what earlier starts wrote beyond the checkpoint at `images_seen`."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.warning("TensorBoard files are not written: install the extra `eval` (package tensorboard)")
            return
        threading.excepthook = _excepthook
        purge_step = images_seen + self._has_checkpoint()
        self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=purge_step)

    def record(self, images_seen: int, values: dict[str, float], *, timing: dict[str, float] | None = None) -> None:
        """Append values that follow from position to metrics.jsonl, rates and times to timing.jsonl."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON knows no NaN
        _append(self.metrics, {"images": images_seen, **values})
        self._new = []
        self._draw(images_seen, values)
        if timing is not None:
            self.record_timing(images_seen, timing)

    def record_timing(self, images_seen: int, values: dict[str, float]) -> None:
        """Append rates and times to timing.jsonl."""
        _append(self.timing, {"images": images_seen, "time": round(time.time(), 3), **values})
        self._draw(images_seen, values)

    def show_config(self, config: Mapping[str, object]) -> None:
        """Put the settings on the board, as a table."""
        if self._board is not None:
            rows = "\n".join(f"| {key} | {value} |" for key, value in config.items())
            self._board.add_text("config", f"| setting | value |\n|---|---|\n{rows}", 0)

    def show_grid(self, path: Path, images_seen: int) -> None:
        """Put the grid in a PNG file on the board."""
        if self._board is not None:
            self._board.add_image("samples", decode(path.read_bytes()), images_seen, dataformats="HWC")

    def flush_board(self) -> None:
        """Bring to the disk what the board has so far: a checkpoint that is resumed from must not lack it there."""
        if self._board is not None:
            self._board.flush()

    def _draw(self, images_seen: int, values: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, images_seen)

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush everything and release the lock."""
        if self._board is not None:
            self._board.close()
        logging.getLogger("pipeline").removeHandler(self._log)
        self._log.close()
        self._withdraw()
        self._lock.close()

    def _has_checkpoint(self) -> bool:
        return any(self.path.glob("checkpoints/*/state.json"))

    def _withdraw(self) -> None:
        """Remove what this start has made, unless a run has come of it."""
        if self._has_checkpoint():  # saved before the first record, or from the mirror
            return
        for entry in self._new:
            if entry.parent == self.path and entry.name in FOLDERS:
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.is_file():
                entry.unlink(missing_ok=True)
            else:
                remove_empty(entry)


def begins_from_weights(run: Path) -> bool:
    """Return whether the config.json of a run says that it begins from weights; false where there is none to read."""
    try:
        content = parse_json((run / CONFIG).read_bytes(), str(run / CONFIG))
    except (OSError, DataError):
        return False
    return isinstance(content, dict) and bool(content.get(INIT_FROM))


def known_location(run: Path, config: dict[str, Any]) -> str | None:
    """Return where the data set of a run lies, by RUN/.data, or by its config.json when that is of 0.1.0; else None.

    Raises DataError when .data is damaged.
    """
    if (run / LOCATION).is_file():
        try:
            location = (run / LOCATION).read_bytes().decode().strip()
        except UnicodeDecodeError:
            location = ""
        if not location.isprintable() or not location:
            raise DataError(f"{run / LOCATION}: damaged; name --data to do without it")
        return location
    data = config.get("dataset")
    old = data.get("location") if isinstance(data, dict) else None
    return old if isinstance(old, str) and (os.path.isabs(old) or "://" in old) else None


def _excepthook(arguments: threading.ExceptHookArgs) -> None:
    """Drop the traceback of TensorBoard's thread: on a full disk our own next write reports it in one line."""
    if type(arguments.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(arguments)


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def _lock(path: Path) -> IO[str]:
    """Take the run's lock, waiting a little for a trainer that is about to exit."""
    give_up = time.monotonic() + LOCK_PATIENCE_SECONDS
    waiting = False
    while True:
        make_directory(path.parent)  # the holder may have withdrawn, and the folder with it
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:
                break
            file.close()
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            if time.monotonic() > give_up:
                raise TryAgainError(
                    f"{path.parent}: {holder} is training this run; stop it, or choose another --out"
                ) from None
            if not waiting:
                print(f"{path.parent}: waiting for {holder} to finish", file=sys.stderr, flush=True)
                waiting = True
            time.sleep(0.5)
    return file


def _sign(lock: IO[str]) -> None:
    """Say in the lock's file who holds it."""
    lock.seek(0)
    lock.truncate()
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
