"""Ends a process whose step hangs: when one rank is gone, the others must exit in a minute, not in thirty."""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.common.errors import TryAgainError
from pipeline.common.storage import PATIENCE_SECONDS

FIRST_STEP_SECONDS = 1_800.0
"""What a rank may take for its start and its first step: reading, compiling and tuning kernels."""
BOUNDARY_SECONDS = 900.0
"""The first grid, evaluation or checkpoint, between two steps, and partly on rank 0 alone."""
DATA_SECONDS = PATIENCE_SECONDS
"""How much longer than a step a rank may wait for its images: the attempts at a store take that long."""
LAST_WORDS_SECONDS = 10.0
"""What the error of a collective, which says more, may take to come after the store has gone with rank 0."""

STARTS = "starts"
TRAINS = "trains"

log = logging.getLogger(__name__)


class Peers:
    """What ranks tell each other beside their collectives, in the key-value store where their process group met.

    A rank in a collective runs no Python code but that of its threads. They learn here whom it waits for.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        """`store` is a connection of its own: an operation on one that is shared would wait for another's."""
        self.rank = rank
        self.others = [other for other in range(world_size) if other != rank]
        self._store = store
        self._told = 0
        self._heard: dict[int, bytes] = {}

    def tell(self, words: str) -> None:
        """Let the others hear `words`, again if they are the same as before."""
        self._told += 1
        self._store.set(f"watchdog/{self.rank}", f"{self._told} {words}")

    def listen(self) -> dict[int, str]:
        """Return what each rank has told last, of those that have told anything since the call before."""
        news = {}
        for other in self.others:
            key = f"watchdog/{other}"
            if self._store.check([key]) and (text := bytes(self._store.get(key))) != self._heard.get(other):
                self._heard[other] = text
                news[other] = text.decode().partition(" ")[2]
        return news


class Watchdog:
    """Two threads. One exits the process when the next `beat`, or the end of a `task`, is overdue.

    The other keeps it from that while another rank says that it waits for data, or still starts. While this rank
    starts, another that says nothing for `step_seconds` is gone.

    Only for runs of several processes: one process cannot wait for another. Exiting is all that is left when a
    collective hangs, since no Python code runs until it returns.
    """

    def __init__(self, step_seconds: float, peers: Peers | None) -> None:
        now = time.monotonic()
        self.step_seconds = step_seconds
        self._peers = peers
        self._beaten, self._deadline = now, now + FIRST_STEP_SECONDS
        self._usual, self._steady = step_seconds, False
        self._longest: dict[str, float] = {}
        self._starting = True
        self._waits: tuple[float, str] | None = None  # for its images: since when, from where
        self._excused = False  # a wait for data, here or elsewhere, says nothing about how long steps take
        self._heard_busy = now
        self._heard = dict.fromkeys(peers.others if peers is not None else (), now)
        self._trains: set[int] = set()
        self._told, self._logged = "", now
        self._alone_since: float | None = None  # without the store
        self._stop = threading.Event()

    def beat(self) -> None:
        """Note that a step is done."""
        now = time.monotonic()
        # Slow machines take slow steps; the first also compiled, and only says how long the second may take.
        if not self._excused:
            self._usual = max(self.step_seconds, (20 if self._steady else 2) * (now - self._beaten))
        self._steady, self._starting, self._excused = True, False, False
        self._beaten, self._deadline = now, now + self._usual

    @contextmanager
    def task(self, kind: str) -> Iterator[None]:
        """Allow for a boundary's work: a grid, an evaluation, a checkpoint.

        The first of its kind may take BOUNDARY_SECONDS, a later one ten times as long as the longest before it.
        """
        self._beaten = time.monotonic()
        longest = self._longest.get(kind)
        self._deadline = self._beaten + (BOUNDARY_SECONDS if longest is None else max(self._usual, 10 * longest))
        yield
        now = time.monotonic()
        self._longest[kind] = max(self._longest.get(kind, 0.0), now - self._beaten)
        self._beaten, self._deadline = now, now + self._usual

    @contextmanager
    def waiting_for_data(self, location: str) -> Iterator[None]:
        """Allow for a store's bad minutes while this process waits for its images, and let the others know."""
        self._waits = time.monotonic(), location
        yield
        self._waits = None
        self._deadline = max(self._deadline, time.monotonic() + self._usual)

    def __enter__(self) -> "Watchdog":
        if self._peers is not None and self.step_seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
            threading.Thread(target=self._talk, args=(self._peers,), name="watchdog-peers", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()

    def _talk(self, peers: Peers) -> None:
        # A thread of its own: a store whose machine is gone answers nothing, and must not keep the other from its work.
        try:
            while not self._stop.wait(self.step_seconds / 8):
                self.talk(peers)
        except RuntimeError:  # rank 0 has ended, and the store with it
            self.lose_store()

    def lose_store(self) -> None:
        """Note that rank 0 has ended."""
        self._alone_since = time.monotonic()

    def talk(self, peers: Peers) -> None:
        """Tell the others what keeps this rank, and hear what keeps them. Raises RuntimeError without the store."""
        now, waits = time.monotonic(), self._waits
        waiting: dict[int, str] = {}
        if waits is not None and now - waits[0] > self.step_seconds / 4:
            waiting[peers.rank] = self._told = f"has waited {now - waits[0]:.0f} s for data: {waits[1]}"
            peers.tell(self._told)
        elif self._starting or self._told != TRAINS:
            self._told = STARTS if self._starting else TRAINS
            peers.tell(self._told)
        if self._starting or now - self._beaten > self.step_seconds / 4:
            for other, words in peers.listen().items():
                self._heard[other] = now
                if words == TRAINS:
                    self._trains.add(other)
                elif words == STARTS:  # among ranks that all start, none keeps the others
                    self._heard_busy = self._heard_busy if self._starting else now
                else:
                    self._heard_busy = now
                    waiting[other] = words
        if waiting:
            self._excused = True
            if peers.rank == 0 and now - self._logged > self.step_seconds / 2:
                self._logged = now
                for rank, words in sorted(waiting.items()):
                    log.warning("rank %d %s", rank, words)

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.step_seconds / 4)):
            if why := self.overdue():
                _end(why)

    def overdue(self) -> str:
        """Return why this process must end now, '' if it need not."""
        now, waits = time.monotonic(), self._waits
        if self._starting:
            if self._alone_since is not None and now - self._alone_since > LAST_WORDS_SECONDS:
                return "rank 0 has ended while all start"
            silent = [rank for rank, heard in self._heard.items() if now - heard > self.step_seconds]
            if silent := [rank for rank in silent if rank not in self._trains]:
                ranks = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}"
                return f"{ranks} said nothing for {self.step_seconds:g} s while all start: gone, or hanging"
        # Not both: two that wait for data would keep each other for ever.
        kept = self._heard_busy if waits is None else waits[0] + DATA_SECONDS
        if now <= max(self._deadline, kept + self._usual):
            return ""
        why = "its images have not come" if waits is not None else "another process is gone or hangs"
        return f"no step has finished for {now - self._beaten:.0f} s; {why}"


def _end(why: str) -> None:
    """Say what each thread does, then why, and exit."""
    faulthandler.dump_traceback(all_threads=True)
    print(
        f"error: rank {os.environ.get('RANK', '0')}: {why}. Run it again on all of them: it resumes from the last "
        "checkpoint (limit: runtime.step_timeout_seconds)",
        file=sys.stderr,
        flush=True,
    )
    os._exit(TryAgainError.exit_code)
