"""A process that waits in vain ends itself; one that waits for a rank which waits for its images does not."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import warm_start
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pipeline.training import watchdog
from pipeline.training.watchdog import (
    BOUNDARY_SECONDS,
    DATA_SECONDS,
    FIRST_STEP_SECONDS,
    LAST_WORDS_SECONDS,
    Peers,
    Watchdog,
)

STEP = 60.0
DATA = "s3://bucket/faces"


class Ranks:
    """The watchdogs of three ranks, on a clock of their own, with a real store between them."""

    def __init__(self, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.store = 1_000.0, store  # which ends with the last name of it
        monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.peers = [Peers(store.clone(), rank, 3) for rank in range(3)]
        self.dogs = [Watchdog(STEP, peers) for peers in self.peers]
        self.gone: set[int] = set()

    def train(self, steps: int = 3, seconds: float = 0.1) -> None:
        for _ in range(steps):
            self.now += seconds
            for dog in self.dogs:
                dog.beat()

    def pass_time(self, seconds: float) -> dict[int, tuple[float, str]]:
        """Let both threads of all ranks that are there do their work; return when and why any of them ends."""
        ends: dict[int, tuple[float, str]] = {}
        began = self.now
        while self.now < began + seconds:
            self.now += 2.5
            here = [rank for rank in range(3) if rank not in self.gone]
            for rank in here:
                self.dogs[rank].talk(self.peers[rank])
            ends |= {rank: (self.now - began, why) for rank in here if (why := self.dogs[rank].overdue())}
            self.gone |= ends.keys()
        return ends


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), monkeypatch)


def alone(ranks: Ranks) -> Watchdog:
    """Return the watchdog of a rank that hears of nobody."""
    return ranks.dogs[0]


def ends_after(ranks: Ranks, seconds: float, words: str) -> bool:
    """Whether a rank that nothing keeps is let be for `seconds`, and ends with `words` right then."""
    ranks.now += seconds - 1
    before = alone(ranks).overdue()
    ranks.now += 2
    return not before and words in alone(ranks).overdue()


def test_a_step_that_hangs_ends(ranks: Ranks) -> None:
    ranks.train()
    assert ends_after(ranks, STEP, "another process is gone or hangs")


@pytest.mark.parametrize(("first", "later", "limit"), [(50.0, None, 100.0), (1.0, 10.0, 200.0), (50.0, 0.1, STEP)])
def test_slow_steps_make_it_patient(ranks: Ranks, first: float, later: float | None, limit: float) -> None:
    """The first step also compiled, and says only how long the second may take."""
    ranks.train(1, first)
    if later is not None:
        ranks.train(1, later)
    assert ends_after(ranks, limit, "another process")


def test_the_first_grid_may_take_long_and_the_next_ten_times_as_long_as_that(ranks: Ranks) -> None:
    ranks.train()
    with alone(ranks).task("grid"):
        ranks.now += 20
    with alone(ranks).task("grid"):
        assert ends_after(ranks, 200, "another process")
    ranks.train()
    with alone(ranks).task("evaluation"):
        assert ends_after(ranks, BOUNDARY_SECONDS, "another process")


def test_all_learn_of_the_one_that_waits_for_data(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    ranks.pass_time(10)
    ranks.train()
    with ranks.dogs[2].waiting_for_data(DATA):
        assert ranks.pass_time(300) == {}
    said = [record.getMessage() for record in caplog.records]
    assert said[-1] == f"rank 2 has waited 278 s for data: {DATA}"
    assert len(said) < 12, "said by one rank, and not all the time"
    ranks.train(1)
    assert set(ranks.pass_time(STEP + 5)) == {0, 1, 2}, "the wait says nothing about the time of a step"


def test_one_that_waits_longer_than_a_store_is_tried_ends_first(ranks: Ranks) -> None:
    ranks.train()
    with ranks.dogs[2].waiting_for_data(DATA):
        ends = ranks.pass_time(1_000)
    assert "its images have not come" in ends[2][1]
    assert DATA_SECONDS > 300, "what all attempts at a store take"
    assert STEP + DATA_SECONDS < ends[2][0] < STEP + DATA_SECONDS + 5
    assert all(STEP <= ends[rank][0] - ends[2][0] <= STEP + 5 for rank in (0, 1))


def test_those_that_wait_for_the_same_store_end_together(ranks: Ranks) -> None:
    ranks.train()
    with ranks.dogs[1].waiting_for_data(DATA), ranks.dogs[2].waiting_for_data(DATA):
        assert ranks.pass_time(STEP + DATA_SECONDS) == {}
        assert ranks.pass_time(5).keys() == {1, 2}


def test_one_that_is_gone_while_it_waits_is_not_waited_for(ranks: Ranks) -> None:
    ranks.train()
    with ranks.dogs[2].waiting_for_data(DATA):
        assert ranks.pass_time(100) == {}
        ranks.gone = {2}
        assert ranks.pass_time(STEP + 5).keys() == {0, 1}


def test_a_start_may_take_long_but_not_in_silence(ranks: Ranks) -> None:
    assert ranks.pass_time(600) == {}
    ranks.gone = {1}
    ends = ranks.pass_time(STEP + 5)
    assert ends.keys() == {0, 2}
    assert all(why.startswith("rank 1 said nothing for 60 s while all start") for _, why in ends.values())
    ranks.now += STEP + 5
    assert alone(ranks).overdue().startswith("ranks 1, 2 said nothing")


def test_a_start_ends_when_rank_0_has_ended_but_lets_its_error_come_first(ranks: Ranks) -> None:
    """gloo may wait for ever for a rank that was replaced before all were connected."""
    ranks.dogs[1].lose_store()
    ranks.now += LAST_WORDS_SECONDS - 1
    assert ranks.dogs[1].overdue() == ""
    ranks.now += 2
    assert ranks.dogs[1].overdue() == "rank 0 has ended while all start"


def test_one_that_trains_learns_of_the_end_of_rank_0_by_its_collectives(ranks: Ranks) -> None:
    ranks.train()
    ranks.dogs[1].lose_store()
    ranks.now += STEP - 1
    assert ranks.dogs[1].overdue() == ""


def test_a_start_ends_at_some_time(ranks: Ranks) -> None:
    assert ranks.pass_time(FIRST_STEP_SECONDS - 5) == {}
    assert ranks.pass_time(10).keys() == {0, 1, 2}


def test_one_that_trains_already_waits_for_one_that_still_compiles(ranks: Ranks) -> None:
    """On GPUs the first step returns before it is computed."""
    ranks.pass_time(10)
    for dog in ranks.dogs[:2]:
        dog.beat()
    assert ranks.pass_time(300) == {}
    ranks.dogs[2].beat()
    assert ranks.pass_time(STEP + 5).keys() == {0, 1}


def test_nothing_is_said_while_all_train(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks.pass_time(10)
    ranks.train()
    ranks.pass_time(2.5)
    ranks.train()

    def use(*_: object) -> None:
        raise AssertionError("the store was used")

    monkeypatch.setattr(Peers, "tell", use)
    monkeypatch.setattr(Peers, "listen", use)
    for _ in range(20):
        ranks.pass_time(10)
        ranks.train(1)


def test_a_process_that_hangs_shows_where_and_says_why_last() -> None:
    code = """
import time
from torch.distributed import HashStore
from pipeline.training.watchdog import Peers, Watchdog
def hang_here():
    time.sleep(280)
with Watchdog(0.2, Peers(HashStore(), 0, 2)) as dog:
    dog.beat()
    hang_here()
"""
    done = warm_start.run([sys.executable, "-c", code], timeout=240)
    assert done.returncode == 75, done.stderr
    *stacks, last = done.stderr.splitlines()
    assert any("in hang_here" in line for line in stacks)
    assert last.startswith("error: rank 0: no step has finished for ")
