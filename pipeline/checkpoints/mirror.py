"""Copies finished checkpoints to an object store, beside the training, and brings them back where they are missing."""

import logging
import threading
import time
from collections.abc import Callable

from pipeline.checkpoints.store import Checkpoint, CheckpointStore
from pipeline.common.errors import DataError, TryAgainError
from pipeline.common.storage import Store

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 120.0
HURRIED_SECONDS = 30.0
"""For a run that was asked to stop: how much of a pod's grace period is left is not known."""


class Mirror:
    """One thread that uploads. A store that does not answer costs warnings, never a training step."""

    def __init__(self, location: str, local: CheckpointStore, keep: int) -> None:
        self.store = Store(location)
        self.checkpoints = CheckpointStore(self.store)
        self.local = local
        self.keep = keep
        self.failures = 0
        self._seen = False  # whether what the mirror held at the start is known
        self._failed = False  # the last copy
        self._running: threading.Thread | None = None
        self._waiting: list[float] = []  # since when: what is being copied, and what came meanwhile

    @property
    def lag_seconds(self) -> float:
        """How long a checkpoint that is not known to be on the mirror has waited for its copy; 0 if there is none."""
        waiting = self._waiting[:1]
        return time.monotonic() - waiting[0] if waiting else 0.0

    def restore(self, check: Callable[[Checkpoint], object] = lambda checkpoint: None) -> bool:
        """Copy the mirror's newest undamaged checkpoint here if it is newer than every local one; return whether so.

        So a run that moves back to a machine where it once was does not resume from what it left there. `check`
        raises what speaks against the checkpoint. A mirror that does not answer is an error only where there is
        nothing else to resume from.
        """
        here: Checkpoint | None = None
        try:
            here = self.local.load_latest()
        except DataError as error:
            log.warning("%s; looking in the mirror", error)
        try:
            newest = self.checkpoints.names()[-1:]
            self._seen = True
            if not newest or (here is not None and int(newest[0]) <= here.images_seen):
                return False
            there = self.checkpoints.load_latest()
        except (DataError, TryAgainError) as error:
            if here is None:
                raise
            log.warning("%s; resuming from %s without the mirror", error, here.path)
            return False
        if there is None or (here is not None and there.images_seen <= here.images_seen):
            return False
        check(there)
        self.local.copy(there, self.checkpoints)
        log.info("brought back checkpoint %d from %s", there.images_seen, self.store.location)
        return True

    def restore_best(self, before: int) -> None:
        """Copy the mirror's best checkpoint from before a position here, if it is better than every local one."""
        try:
            here, there = self.local.load_best(before), self.checkpoints.load_best(before)
            if there is not None and (here is None or there.images_seen != here.images_seen):
                self.local.copy(there, self.checkpoints)
        except (DataError, TryAgainError) as error:
            log.warning("%s; looking for the best checkpoint without the mirror", error)

    def push(self) -> None:
        """Copy what the mirror lacks, in the background. Only one copy runs; the next push takes what it missed."""
        self._waiting = [*self._waiting[:1], time.monotonic()]
        if self._running is None or not self._running.is_alive():
            # A daemon: a store that hangs must not keep the process from ending.
            self._running = threading.Thread(target=self._push, name="mirror", daemon=True)
            self._running.start()

    def close(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """Wait for the copy in progress, then copy the last checkpoint if it is not there yet; no longer in all."""
        if self._running is None:
            return
        until = time.monotonic() + patience_seconds
        self._running.join(patience_seconds)
        if not self._running.is_alive() and not self._failed:
            self.push()
            self._running.join(max(0.0, until - time.monotonic()))
        if self._running.is_alive():
            log.warning("%s: the copy is not done; the next start makes it", self.store.location)

    def _push(self) -> None:
        self._failed = True
        begun = time.monotonic()
        try:
            newest = self.local.names()[-1:]
            beyond = [name for name in self.checkpoints.names() if newest and name > newest[0]]
            if beyond and not self._seen:
                raise DataError(
                    f"{self.store.location}: holds checkpoint {int(beyond[-1])}, but did not answer when this run "
                    "began further back: stop it and start it again to resume from there, or name another --mirror"
                )
            if newest:  # damaged there, and so skipped, or written by a course that the run has abandoned
                self.checkpoints.discard_after(int(newest[0]))
            self._copy(newest[0] if newest else None)
            self._copy(self.local.best())
            self.checkpoints.retain(self.keep)
            self._failed = False
            self._waiting = [since for since in self._waiting if since > begun]
        except Exception as error:  # whatever it was, training continues
            self.failures += 1
            log.warning("the last checkpoint is not mirrored: %s", error)

    def _copy(self, name: str | None) -> None:
        """Copy one checkpoint unless it is there; one that is damaged here must not keep later ones from the mirror."""
        if name is None or name in self.checkpoints.names():
            return
        try:
            self.checkpoints.copy(self.local.load(name), self.local)
        except DataError as error:
            self.failures += 1
            log.warning("not mirrored: %s", error)
