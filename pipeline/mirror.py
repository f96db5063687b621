"""Copies finished checkpoints to an object store, beside the training, and brings them back on an empty disk."""

import logging
import threading
from typing import Any

from pipeline.checkpoint import CheckpointStore
from pipeline.errors import DataError
from pipeline.storage import Store

log = logging.getLogger(__name__)


class Mirror:
    """One thread that uploads; a store that is away costs warnings, never a training step."""

    def __init__(self, location: str, local: CheckpointStore, keep: int) -> None:
        self.store = Store(location)
        self.checkpoints = CheckpointStore(self.store)
        self.local = local
        self.keep = keep
        self.failures = 0
        self._running: threading.Thread | None = None

    def restore(self) -> bool:
        """If the local disk holds no undamaged checkpoint, bring the mirror's newest one. Whether it did."""
        try:
            if self.local.load_latest() is not None:
                return False
        except DataError as error:
            log.warning("%s; looking in the mirror", error)
        checkpoint = self.checkpoints.load_latest()
        if checkpoint is None:
            return False
        kept: dict[str, Any] = {
            key: value for key, value in checkpoint.state.items() if key not in ("version", "images_seen", "files")
        }
        self.local.save(checkpoint.images_seen, checkpoint.files, kept)
        log.info("brought back checkpoint %d from %s", checkpoint.images_seen, self.store.location)
        return True

    def push(self) -> None:
        """Copy what the mirror lacks, in the background. Only one copy runs; the next push takes what it missed."""
        if self._running is None or not self._running.is_alive():
            # A daemon: a store that hangs must not keep the process from ending.
            self._running = threading.Thread(target=self._push, name="mirror", daemon=True)
            self._running.start()

    def close(self, patience_seconds: float = 120.0) -> None:
        """Wait for the copy in progress, then copy the last checkpoint if it is not there yet."""
        if self._running is None:
            return
        self._running.join(patience_seconds)
        self.push()
        self._running.join(patience_seconds)

    def _push(self) -> None:
        try:
            newest = self.local.names()[-1:]
            if newest:  # what lies beyond belongs to a course that the run has left
                self.checkpoints.discard_after(int(newest[0]))
            there = set(self.checkpoints.names())
            wanted = {*newest, self.local.best("swd")} - {None}
            for name in sorted(wanted - there, key=str):
                self.checkpoints.copy(str(name), self.local)
            self.checkpoints.retain(self.keep)
        except Exception as error:  # whatever it was, training goes on
            self.failures += 1
            log.warning("the mirror lacks the last checkpoint: %s", error)
