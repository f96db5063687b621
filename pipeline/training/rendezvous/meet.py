"""The ranks of a run meet before their process group, which would wait for them in silence, and for some for ever."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NoReturn

from accelerate.utils.environment import get_cpu_distributed_information
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from pipeline.common.errors import TryAgainError, first_line

WAIT_SECONDS = 1_800.0
"""How long a rank waits for the others; as torch does."""
FIRST_SAY_SECONDS = 10.0
SAY_SECONDS = 60.0
"""How often it says for whom."""
ANSWER_SECONDS = 45.0
"""How long a store may leave a question unanswered: its machine was cut off, and no error will ever come."""
FRESH_SECONDS = 5.0
"""A rank that has not been heard of for so long is not here any more."""
LOOK_SECONDS = 0.25
CONNECT_SECONDS = 5.0

_MET, _MISSING, _OTHERS = "meet/met", "meet/missing", "meet/world"


def meet(
    say: Callable[[str], None] | None = None, waited: Callable[[float], None] = lambda seconds: None
) -> tuple[Any, int, int] | None:
    """Return the key-value store where all ranks have met, this rank and their number; None for a process alone.

    `waited` hears for how many seconds it has waited, and 0 when all have come.

    Rank 0 serves the store at MASTER_ADDR:MASTER_PORT, and the process group meets there, too. Rank 0 gives the sign
    when it hears of all ranks at once: one that came and went is waited for. A rank that comes later, in place of one
    that is gone, waits until the others have noticed, ended, and come again.

    Raises TryAgainError when they do not come within WAIT_SECONDS, or were started as another number of ranks.
    """
    known = get_cpu_distributed_information()  # as accelerate finds it, on GPUs as well
    host, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT") or "29500")
    if known.world_size == 1 or not host:
        return None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # the agents of torchrun have met, and serve the store
        store = TCPStore(host, port, known.world_size, False, timedelta(seconds=SAY_SECONDS))
        met = PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    else:
        met = _Meeting(known.rank, known.world_size, host, port, say or speaker(os.environ), waited).hold()
        waited(0.0)
    return met, known.rank, known.world_size


def speaker(environment: Mapping[str, str]) -> Callable[[str], None]:
    """Return what says a line: on standard error, and for one process of each machine, which has its own log."""
    return _print if environment.get("LOCAL_RANK", "0") == "0" else lambda line: None


class _Meeting:
    def __init__(
        self,
        rank: int,
        world_size: int,
        host: str,
        port: int,
        say: Callable[[str], None],
        waited: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.rank, self.world_size, self.host, self.port = rank, world_size, host, port
        self._say, self._waited = say, waited
        self._token = os.urandom(8).hex()  # tells this process from one that had its rank
        now = time.monotonic()
        self._began = self._answered = now
        self._say_next = now + FIRST_SAY_SECONDS
        self._heard: dict[int, tuple[str, float]] = {}  # what each rank said last, and when that changed

    def hold(self) -> Any:
        """Return the store when all have met."""
        met = threading.Event()
        threading.Thread(target=self._guard, args=(met,), name="rendezvous", daemon=True).start()
        try:
            while True:
                store = self._open()
                try:
                    if self._gather(store):
                        return store
                except RuntimeError as error:  # torch's: the connection is lost
                    if self.rank == 0:
                        raise
                    self._wait(f"rank 0 at {self.host}:{self.port}, which has gone again ({first_line(error)[:80]})")
        finally:
            met.set()

    def _open(self) -> Any:
        """Return the store: rank 0 serves it, the others find it as soon as rank 0 is there."""
        if self.rank == 0:
            try:
                return self._store()
            except RuntimeError as error:
                raise TryAgainError(
                    f"rank 0 cannot listen at {self.host}:{self.port} ({first_line(error)[:160]}): another run or "
                    "program may have this port. Choose another by MASTER_PORT or dcgan-launch --port"
                ) from None
        while True:
            try:
                # Asked first without torch, which prints every attempt.
                socket.create_connection((self.host, self.port), CONNECT_SECONDS).close()
                return self._store()
            except (OSError, RuntimeError) as error:
                self._wait(f"rank 0 at {self.host}:{self.port} ({first_line(error)[:80]}); look at its log")

    def _store(self) -> Any:
        limit = timedelta(seconds=SAY_SECONDS if self.rank == 0 else CONNECT_SECONDS)
        return TCPStore(
            self.host, self.port, self.world_size, self.rank == 0, limit, wait_for_workers=False, multi_tenant=True
        )

    def _gather(self, store: Any) -> bool:
        """Return True when all have met, this process among them. Raises RuntimeError when the store is lost."""
        number = 0
        while not store.check([_MET]):
            number += 1
            store.set(f"meet/{self.rank}", f"{self._token} {number}")
            if self.rank == 0:
                missing = self._count(store)
            else:
                self._compare(store)
                missing = store.get(_MISSING).decode() if store.check([_MISSING]) else ""
            if missing:
                self._wait(missing)
        if self._token in store.get(_MET).decode().split():
            return True
        while True:  # until the store goes with rank 0
            store.check([_MET])
            self._wait("the others, which still run with the process that this one replaces, until they miss it")

    def _count(self, store: Any) -> str:
        """Hear who is here. Give the sign when all are, else return who is missing, and tell the others. By rank 0."""
        now = time.monotonic()
        store.set(f"{_OTHERS}/0", str(self.world_size))
        if store.check([_OTHERS]):
            rank, world_size = store.get(_OTHERS).decode().split()
            self._differ(rank, world_size)
        for rank in range(self.world_size):
            if store.check([f"meet/{rank}"]) and (text := store.get(f"meet/{rank}").decode()) != self._last(rank):
                self._heard[rank] = text, now
        away = [rank for rank in range(self.world_size) if now - self._heard.get(rank, ("", -1e9))[1] > FRESH_SECONDS]
        if not away:
            store.set(_MET, " ".join(text.split()[0] for text, _ in self._heard.values()))
            return ""
        missing = f"rank{'s' * (len(away) > 1)} {', '.join(map(str, away))} of {self.world_size}"
        store.set(_MISSING, missing)
        return missing

    def _last(self, rank: int) -> str:
        return self._heard[rank][0] if rank in self._heard else ""

    def _compare(self, store: Any) -> None:
        """Raise TryAgainError, here and in rank 0, when that one was started as one of another number of ranks."""
        if store.check([f"{_OTHERS}/0"]) and (world_size := int(store.get(f"{_OTHERS}/0"))) != self.world_size:
            store.set(_OTHERS, f"{self.rank} {self.world_size}")
            self._differ("0", str(world_size))

    def _differ(self, rank: str, world_size: str) -> NoReturn:
        raise TryAgainError(
            f"rank {self.rank} was started as one of {self.world_size} and rank {rank} as one of {world_size}: the "
            "number of machines or processes was changed under a run. Stop all of them, and start them again"
        )

    def _wait(self, whom: str) -> None:
        """Wait a moment for `whom`, and say so from time to time. The store has just answered, or is gone."""
        self._answered = now = time.monotonic()
        self._waited(now - self._began)
        left = self._began + WAIT_SECONDS - now
        if left < 0:
            raise TryAgainError(f"rank {self.rank} waited {WAIT_SECONDS / 60:.0f} minutes in vain for {whom}")
        if now >= self._say_next:
            self._say_next = now + SAY_SECONDS
            self._say(f"rank {self.rank}: waiting for {whom}; for {left / 60:.0f} more minutes")
        time.sleep(LOOK_SECONDS)

    def _guard(self, met: threading.Event) -> None:
        """End the process when the store answers nothing."""
        while not met.wait(min(1.0, ANSWER_SECONDS / 4)):
            if time.monotonic() - self._answered > ANSWER_SECONDS:
                _print(
                    f"error: rank {self.rank}: rank 0 at {self.host}:{self.port} has answered nothing for "
                    f"{ANSWER_SECONDS:.0f} s: its machine may be cut off. Start all ranks again: the run resumes from "
                    "the last checkpoint"
                )
                os._exit(TryAgainError.exit_code)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
