"""CheckpointStore: directories in which `state.json`, written last, is the commit.

See docs/architecture.md, contract 4.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.common.errors import ConfigConflict, DataError
from pipeline.common.records import parse_json
from pipeline.common.storage import Store, require_plain_name, sha256_bytes

CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints."""
STATE = "state.json"
VERSION = 1
POSITION_DIGITS = 15
"""Digits of the longest position; a checkpoint's folder has 12 of them, or more when it needs more."""
_POSITION = re.compile(f"[0-9]{{1,{POSITION_DIGITS}}}")
HISTORY = "history"
"""Folder beside the checkpoints, and the entry of state.json, of the parts of metrics.jsonl that they share."""
PART_BYTES = 1 << 20
"""A part is as many whole lines as exceed this. A checkpoint itself holds only the lines after the last part."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, every file checked against its hash."""

    path: str
    state: dict[str, Any]
    """The content of state.json."""
    files: dict[str, bytes]
    """Every other file by name."""

    @property
    def images_seen(self) -> int:
        """Position of the run: real images seen over all processes."""
        return int(self.state["images_seen"])

    def file(self, name: str) -> bytes:
        """Return one file. Raises DataError when the checkpoint lists none of that name."""
        if name not in self.files:
            raise DataError(f"{self.path}/{name}: the checkpoint has no such file")
        return self.files[name]

    @property
    def history(self) -> list[str]:
        """The parts of metrics.jsonl, by their SHA-256, that come before `files["metrics.jsonl"]`."""
        return list(self.state.get(HISTORY, []))


class CheckpointStore:
    """The checkpoints of a run, on a disk or in an object store.

    A checkpoint is complete exactly when its state.json is there; it names every other file and its SHA-256.
    """

    def __init__(self, store: Store, *, folder: str = CHECKPOINTS) -> None:
        self.store = store
        self.folder = folder

    def _name(self, name: str, file: str = "") -> str:
        return "/".join(part for part in (self.folder, name, file) if part)

    def path(self, name: str) -> str:
        """Return the full path or URL of the checkpoint `name`."""
        return self.store.path(self._name(name))

    def names(self) -> list[str]:
        """Return the names of the complete checkpoints, oldest first."""
        found = (name for name in self.store.names(self.folder) if _POSITION.fullmatch(name))
        return [name for name in found if self.store.exists(self._name(name, STATE))]

    def state(self, name: str) -> dict[str, Any]:
        """Return the content of a checkpoint's state.json.

        Raises DataError when it is damaged, ConfigConflict when another release wrote it: that is no damage, and
        must not make a run fall back and overwrite it.
        """
        where = self.store.path(self._name(name, STATE))
        state = parse_json(self.store.read(self._name(name, STATE)), where, nan=True)
        damaged = DataError(f"{where}: damaged; expected the JSON that the trainer writes")
        if not isinstance(state, dict) or "version" not in state:
            raise damaged
        if (version := state["version"]) != VERSION:
            raise ConfigConflict(f"{where}: version {version}; this release reads version {VERSION}: use a newer one")
        files, history, seen = state.get("files"), state.get(HISTORY, []), state.get("images_seen")
        if not isinstance(files, dict) or type(seen) is not int or not 0 <= seen < 10**POSITION_DIGITS:
            raise damaged
        if any(not isinstance(state.get(key, {}), dict) for key in ("config", "dataset", "metrics")):
            raise damaged
        if not isinstance(history, list):
            raise damaged
        # They become paths: a store that is not ours must not name one elsewhere.
        for part in history:
            if not isinstance(part, str):
                raise damaged
            require_plain_name(part, where)
        for file, sha256 in files.items():
            require_plain_name(file, where)
            if not isinstance(sha256, str):
                raise damaged
        return state

    def verify(self, name: str, file: str) -> bytes:
        """Return one file of a checkpoint. Raises DataError when it is missing, cut short or altered."""
        expected = self.state(name)["files"].get(file)
        where = self.store.path(self._name(name, file))
        if expected is None:
            raise DataError(f"{where}: the checkpoint has no such file")
        data = self.store.read(self.store.inside(self._name(name, file)))
        found = sha256_bytes(data)
        if found != expected:
            raise DataError(f"{where}: its SHA-256 is {found[:12]}..., state.json says {expected[:12]}...: damaged")
        return data

    def load(self, name: str) -> Checkpoint:
        """Read a whole checkpoint. Raises DataError when anything in it is damaged."""
        state = self.state(name)
        if state["images_seen"] != int(name):
            where = self.store.path(self._name(name, STATE))
            raise DataError(f"{where}: says {state['images_seen']} images, its folder says {int(name)}: damaged")
        return Checkpoint(self.path(name), state, {file: self.verify(name, file) for file in state["files"]})

    def load_latest(self) -> Checkpoint | None:
        """Return the newest undamaged checkpoint, naming those it skips; None if there was never one.

        Raises DataError when there are checkpoints but all are damaged: a run never silently starts over.
        """
        names = self.names()
        for name in reversed(names):
            try:
                return self.load(name)
            except DataError as error:
                log.warning("%s; trying the checkpoint before it", error)
        if names:
            raise DataError(
                f"{self.store.path(self.folder)}: all {len(names)} checkpoints are damaged; "
                "restore one, or start a new run in another --out"
            )
        return None

    def best(self) -> str | None:
        """Return the complete checkpoint with the lowest `schedule.best_metric`, or None if none was evaluated."""
        return next(iter(self.ranked()), None)

    def load_best(self, before: int) -> Checkpoint | None:
        """Return the best undamaged checkpoint from before a position, naming those it skips; None if there is none."""
        for name in self.ranked():
            try:
                if int(name) < before:
                    return self.load(name)
            except DataError as error:
                log.warning("%s; trying the next best checkpoint", error)
        return None

    def ranked(self) -> list[str]:
        """Return the complete checkpoints that were evaluated, best first by `schedule.best_metric`.

        The newest checkpoint says which metric that is; those that were not evaluated by it do not count.
        """
        states: dict[str, dict[str, Any]] = {}
        for name in self.names():
            try:
                states[name] = self.state(name)
            except DataError as error:
                log.warning("%s", error)
        if not states:
            return []
        schedule = states[max(states)].get("config", {}).get("schedule")
        metric = schedule.get("best_metric", "swd") if isinstance(schedule, dict) else "swd"
        values = {name: state.get("metrics", {}).get(str(metric)) for name, state in states.items()}
        evaluated = {
            name: value for name, value in values.items() if isinstance(value, int | float) and abs(value) < math.inf
        }
        return sorted(evaluated, key=lambda name: evaluated[name])

    def choose(self, choice: str = "") -> str | None:
        """Return the checkpoint that `best`, `last`, a number of images, or '' (best, else last) means."""
        names = self.names()
        if choice.isdigit():
            return next((name for name in names if int(name) == int(choice)), None)
        last = names[-1] if names else None
        if choice == "last":
            return last
        best = self.best()
        return best if choice == "best" else best or last

    def save(self, images_seen: int, files: Mapping[str, bytes], state: Mapping[str, Any]) -> str:
        """Write a checkpoint and return its name. It counts only when everything in it has reached the disk."""
        name = f"{images_seen:012d}"
        self.store.delete(self._name(name, STATE))  # a damaged one at this position must not commit half new files
        self.store.remove_abandoned(self._name(name))
        hashes = {file: sha256_bytes(data) for file, data in files.items()}
        content = {"version": VERSION, "images_seen": images_seen, **state, "files": hashes}
        whole = {**files, STATE: (json.dumps(content, indent=1) + "\n").encode()}
        self.store.write_all({self._name(name, file): data for file, data in whole.items()})
        return name

    def discard_after(self, images_seen: int) -> None:
        """Un-commit every checkpoint beyond a position: a run that fell back to an earlier one writes them again."""
        for name in self.names():
            if int(name) > images_seen:
                self.store.delete(self._name(name, STATE))

    def write_part(self, lines: bytes) -> str:
        """Write a part of metrics.jsonl unless it is here; return its SHA-256, by which checkpoints name it later."""
        part = sha256_bytes(lines)
        name = self._name(HISTORY, f"{part}.jsonl")
        if not self.store.exists(name):
            self.store.remove_abandoned(self._name(HISTORY))
            self.store.write(name, lines)
        return part

    def read_parts(self, parts: Iterable[str]) -> Iterator[bytes]:
        """Yield parts of metrics.jsonl, one after another. A damaged one is named and left out: weights matter more."""
        for part in parts:
            name = self._name(HISTORY, f"{part}.jsonl")
            try:
                lines = self.store.read(self.store.inside(name))
                if sha256_bytes(lines) != part:
                    raise DataError(f"{self.store.path(name)}: damaged")
            except DataError as error:
                log.warning("%s; metrics.jsonl continues without its lines", error)
            else:
                yield lines

    def copy(self, checkpoint: Checkpoint, source: "CheckpointStore") -> None:
        """Write a checkpoint that was loaded from another store, and what this one lacks of its history."""
        here = set(self.store.names(self._name(HISTORY))) if checkpoint.history else set()
        for lines in source.read_parts(part for part in checkpoint.history if f"{part}.jsonl" not in here):
            self.write_part(lines)
        kept = {key: value for key, value in checkpoint.state.items() if key not in ("version", "images_seen", "files")}
        self.save(checkpoint.images_seen, checkpoint.files, kept)

    def retain(self, keep: int) -> None:
        """Delete all but the newest `keep` complete checkpoints and the best one; older unfinished ones as well."""
        names = self.names()
        kept = {*names[-keep:], self.best()}
        newest = names[-1] if names else ""
        for name in self.store.names(self.folder):
            if _POSITION.fullmatch(name) and name not in kept and name < newest:
                self.store.delete(self._name(name, STATE))  # first, so that what is half deleted never counts
                self.store.delete(self._name(name))
