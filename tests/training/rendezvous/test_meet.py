"""Ranks wait for each other with words, and none is left behind. Each is a thread here, at a real store."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import warm_start
from ports import free_port
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pipeline.common.errors import TryAgainError
from pipeline.training.rendezvous import meet as rendezvous
from pipeline.training.rendezvous.meet import meet, speaker


class Killed(BaseException):
    """What ends a thread that stands for a process."""


class Rank:
    """A rank that comes; what it said, and how its meeting ended."""

    def __init__(self, rank: int, world_size: int, port: int) -> None:
        self.said: list[str] = []
        self.waited: list[float] = []
        self.end: object = None
        self.store: Any = None
        self._killed = False
        self._meeting = rendezvous._Meeting(rank, world_size, "127.0.0.1", port, self._hear, self.waited.append)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _hear(self, line: str) -> None:
        self.said.append(line)
        if self._killed:
            raise Killed

    def _run(self) -> None:
        try:
            self.store = self._meeting.hold()
            self.end = "met"
        except (TryAgainError, Killed) as error:
            self.end = error

    def kill(self) -> None:
        self._killed = True
        self._thread.join(200)
        assert isinstance(self.end, Killed)
        del self._meeting

    def wait_for(self, words: str) -> None:
        until(lambda: any(words in line for line in self.said))

    def ends(self) -> object:
        self._thread.join(200)
        return self.end


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    for name, seconds in {"FIRST_SAY": 0, "SAY": 0, "LOOK": 0.01, "FRESH": 0.5}.items():
        monkeypatch.setattr(rendezvous, f"{name}_SECONDS", seconds)
    monkeypatch.setattr(rendezvous._Meeting, "_store", store)
    return free_port()


def store(meeting: Any) -> Any:
    """Open the store as the meeting does, but with a server that ends with its object: threads share the others."""
    limit = timedelta(seconds=60)
    at = meeting.host, meeting.port, meeting.world_size, meeting.rank == 0
    return TCPStore(*at, limit, wait_for_workers=False)


def test_all_say_for_whom_they_wait_until_all_are_there(port: int) -> None:
    first, second = Rank(0, 4, port), Rank(1, 4, port)
    first.wait_for("rank 0: waiting for ranks 2, 3 of 4; for 30 more minutes")
    second.wait_for("rank 1: waiting for ranks 2, 3 of 4; ")
    ranks = [first, second, Rank(3, 4, port)]
    ranks[2].wait_for("waiting for rank 2 of 4; ")
    ranks.append(Rank(2, 4, port))
    assert [rank.ends() for rank in ranks] == ["met"] * 4
    ranks[2].store.set("all", "use it")
    assert ranks[1].store.get("all") == b"use it"
    for rank in ranks[:2]:
        assert rank.waited == sorted(rank.waited), "longer and longer"
        assert rank.waited[-1] > 0


def test_one_that_comes_before_rank_0_says_where_it_looks_and_why_in_vain(port: int) -> None:
    early = Rank(1, 2, port)
    early.wait_for(f"rank 1: waiting for rank 0 at 127.0.0.1:{port} ([Errno 111] Connection refused); look at its log")
    assert [Rank(0, 2, port).ends(), early.ends()] == ["met", "met"]


def test_one_that_came_and_went_is_waited_for(port: int) -> None:
    """torch counts those that have come, so the three others would go on without it, and never be all."""
    first, gone = Rank(0, 3, port), Rank(1, 3, port)
    first.wait_for("waiting for rank 2 of 3")
    gone.kill()
    first.said.clear()
    first.wait_for("waiting for ranks 1, 2 of 3")
    late = Rank(2, 3, port)
    late.wait_for("waiting for rank 1 of 3")
    assert [rank.ends() for rank in (Rank(1, 3, port), first, late)] == ["met"] * 3


def test_one_that_replaces_another_waits_until_all_come_again(port: int) -> None:
    first, second = Rank(0, 2, port), Rank(1, 2, port)
    assert [first.ends(), second.ends()] == ["met", "met"]
    late = Rank(1, 2, port)
    late.wait_for("waiting for the others, which still run with the process that this one replaces")
    del second.store
    del first.store, first._meeting
    late.wait_for("rank 0")
    assert [Rank(0, 2, port).ends(), late.ends()] == ["met", "met"]


def test_ranks_of_another_number_of_machines_are_told_apart(port: int) -> None:
    first, other = Rank(0, 2, port), Rank(3, 4, port)
    for rank in (first, other):
        end = rank.ends()
        assert isinstance(end, TryAgainError)
        assert "the number of machines or processes was changed under a run" in str(end)
    assert "rank 0 was started as one of 2 and rank 3 as one of 4" in str(first.end)


def test_nobody_waits_for_ever(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "WAIT_SECONDS", 0.3)
    end = Rank(0, 2, port).ends()
    assert isinstance(end, TryAgainError)
    assert "waited 0 minutes in vain for rank 1 of 2" in str(end)


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        end = Rank(0, 2, taken).ends()
    assert isinstance(end, TryAgainError)
    assert f"cannot listen at 127.0.0.1:{taken}" in str(end)
    assert "--port" in str(end)


def test_a_process_alone_meets_nobody_and_one_of_each_machine_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert meet() is None
    speaker({"LOCAL_RANK": "1"})("not this")
    speaker({"LOCAL_RANK": "0"})("this")
    assert capsys.readouterr().err == "this\n"


def test_under_torchrun_the_agents_have_met_already(monkeypatch: pytest.MonkeyPatch) -> None:
    agents = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agents.port)}
    given |= {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**given, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    found = meet()
    assert found is not None
    assert found[1:] == (1, 2)
    found[0].set("word", "heard")
    assert agents.get("attempt/2/word") == b"heard"


def test_a_store_that_answers_nothing_ends_the_rank() -> None:
    """As of a machine that was cut off: the connection stands, and no error comes."""
    code = """
from pipeline.training.rendezvous import meet as rendezvous
rendezvous.ANSWER_SECONDS = 1.0
rendezvous.meet()
"""
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and says nothing
        place = {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(server.getsockname()[1]),
        }
        done = warm_start.run([sys.executable, "-c", code], env={**os.environ, **place}, timeout=240)
    assert done.returncode == 75, done.stderr
    assert "error: rank 1: rank 0 at 127.0.0.1:" in done.stderr.splitlines()[-1]
    assert "has answered nothing" in done.stderr
