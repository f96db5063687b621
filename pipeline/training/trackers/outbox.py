"""Sends to a tracker what a run's files hold, up to its last checkpoint, and each step once."""

import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as NotDone
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from pipeline.common.errors import first_line
from pipeline.data.loading.thread_pool import ThreadPool

log = logging.getLogger(__name__)

Config = dict[str, str | int | float | bool]

TRACKED = "tracked"
"""The entry of config.json and state.json that holds the id of a run's records in trackers."""


class Tracker(Protocol):
    """A run as another program records it. One thread makes all calls."""

    name: str

    def open(self) -> int:
        """Begin the record, or continue it; return the last step that it holds, -1 for none."""

    def log(self, step: int, values: dict[str, float], picture: Path | None) -> None:
        """Record the values and the picture of a step, which is larger than those before."""

    def close(self) -> None:
        """Send what is waiting, and end this part of the record."""


class Outbox:
    """What a run's metrics.jsonl and grids hold, on its way to one tracker, in a thread of its own.

    A step is sent when a checkpoint that covers it is complete. A run resumes from a complete checkpoint, so it never
    makes again what a tracker has. The tracker itself knows what it has, whatever was killed meanwhile: each start
    asks it, and sends what it lacks.
    """

    def __init__(self, tracker: Tracker, run: Path, images_seen: int) -> None:
        """`run` is the run directory, whose records end at `images_seen`."""
        self.tracker = tracker
        self._run = run
        found = {int(path.stem): path for path in (run / "samples").glob("*.png") if path.stem.isdigit()}
        self._pictures = {step: path for step, path in found.items() if step <= images_seen}
        self._last: int | None = None  # the last step that the tracker has, when it is open
        self._offset = 0  # bytes of metrics.jsonl that were read
        self._failed = False
        self._pool = ThreadPool(1, f"tracker-{tracker.name}")

    def drew(self, picture: Path) -> None:
        """Note that there is a grid; its file is named after its step."""
        self._pictures[int(picture.stem)] = picture

    def send(self, images: int) -> None:
        """Begin to send everything up to the checkpoint of `images`."""
        self._pool.submit(lambda: self._try(lambda: self._send(images)))

    def close(self, until: float) -> None:
        """Wait until all is sent, not beyond `time.monotonic()` = `until`, and end the record."""
        done = self._pool.submit(lambda: self._try(self._close))
        try:
            done.result(max(0.0, until - time.monotonic()))
        except NotDone:
            log.warning("%s: it has not taken everything yet; a resume sends the rest", self.tracker.name)
        self._pool.close()

    def _try(self, work: Callable[[], None]) -> None:
        """Do `work`; a failure ends the record and nothing else."""
        if self._failed:
            return
        try:
            work()
        except (Exception, SystemExit) as error:  # some libraries exit
            self._failed = True
            log.warning(
                "%s: %s; the run continues without it, and sends what it lacks when it is started again",
                self.tracker.name,
                first_line(error)[:200],
            )

    def _send(self, images: int) -> None:
        if self._last is None:
            self._last = self.tracker.open()
        for step, values, picture in self._steps(images):
            if step > self._last:
                self.tracker.log(step, values, picture)
                self._last = step

    def _close(self) -> None:
        if self._last is not None:
            self.tracker.close()

    def _steps(self, images: int) -> Iterator[tuple[int, dict[str, float], Path | None]]:
        """Yield (step, values, picture) of everything up to `images` that was not yielded before, in order."""
        values: dict[int, dict[str, float]] = {}
        with (self._run / "metrics.jsonl").open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n") or (record := json.loads(line))["images"] > images:
                    break
                values.setdefault(record.pop("images"), {}).update(record)
                self._offset += len(line)
        pictures = {step: self._pictures.pop(step) for step in list(self._pictures) if step <= images}
        for step in sorted(values.keys() | pictures.keys()):
            yield step, values.get(step, {}), pictures.get(step)


def is_tracked(value: object) -> TypeGuard[str]:
    """Whether `value`, from a file, is an id that `new_id` may have made."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16}", value) is not None


def new_id() -> str:
    """Return an id that no other run has."""
    return secrets.token_hex(8)


def flat_config(description: dict[str, Any]) -> Config:
    """Return the settings of a run and what is known of its data set, one number or text each."""
    sections = {**description["config"], "dataset": description["dataset"]}
    flat = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    return {
        key: value if isinstance(value, str | int | float | bool) else json.dumps(value) for key, value in flat.items()
    }
