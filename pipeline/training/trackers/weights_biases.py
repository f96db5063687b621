"""A run in Weights & Biases: offline, in the run directory, unless WANDB_MODE says otherwise."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.training.trackers.outbox import Config

BLOCK_BYTES = 32_768
HEADER = struct.Struct("<IHB")  # checksum, length, kind
FILE_HEADER_BYTES = 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class WandbRun:
    """Through accelerate's tracker. Each start of a run adds a file; together they are the run of one id."""

    name = "wandb"

    def __init__(self, run: Path, tracked: str, config: Config) -> None:
        """`tracked` is the run's id there."""
        self._folder = Path(os.environ.get("WANDB_DIR") or run)
        self._run = run
        self._id = tracked
        self._config = config
        self._tracker: Any = None

    def open(self) -> int:
        """See `Tracker`. What the files of earlier starts hold counts as sent, and so does what the server has."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # before its import
        import wandb
        from accelerate.tracking import WandBTracker

        last = max((last_step(path) for path in self._folder.glob(f"wandb/*run-*-{self._id}/run-*.wandb")), default=-1)
        self._tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT") or "dcgan",
            id=self._id,
            name=os.environ.get("WANDB_NAME") or self._run.resolve().name,
            dir=str(self._folder),
            mode=os.environ.get("WANDB_MODE") or "offline",
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        self._tracker.start()
        self._tracker.store_init_configuration(self._config)
        return max(last, int(self._tracker.run.starting_step) - 1)

    def log(self, step: int, values: dict[str, float], picture: Path | None) -> None:
        """See `Tracker`. A step is one record, so that it is there as a whole or not at all."""
        import wandb

        pictures = {"samples": wandb.Image(str(picture))} if picture is not None else {}
        self._tracker.log({**values, **pictures}, step=step, commit=True)

    def close(self) -> None:
        """See `Tracker`."""
        self._tracker.finish()


def last_step(path: Path) -> int:
    """Return the last step in a .wandb file, -1 for none. What a kill left half-written at its end does not count.

    The file is LevelDB's log format behind a header of its own; each record is a protobuf message.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    last = -1
    for content in records(path.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        if record.HasField("history"):
            last = max(last, record.history.step.num)
    return last


def records(data: bytes) -> Iterator[bytes]:
    """Yield the whole records of a log. A record is cut where a block of 32 KiB ends."""
    at, parts = FILE_HEADER_BYTES, b""
    while at + HEADER.size <= len(data):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < HEADER.size:
            at += left
            continue
        _, length, kind = HEADER.unpack_from(data, at)
        begin, at = at + HEADER.size, at + HEADER.size + length
        if kind not in (WHOLE, FIRST, MIDDLE, LAST) or at > len(data):
            return
        parts = data[begin:at] if kind in (WHOLE, FIRST) else parts + data[begin:at]
        if kind in (WHOLE, LAST):
            yield parts
