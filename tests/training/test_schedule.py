"""What is due follows from images seen, wherever a run was resumed, from what it costs, and from minutes."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ScheduleConfig
from pipeline.training.schedule import AGREEMENT_SECONDS, SAVING, TASKS, Due, Schedule

CONFIG = ScheduleConfig(
    total_images=1_000,
    log_every_images=50,
    grid_every_images=100,
    checkpoint_every_images=200,
    evaluate_every_images=400,
)

ALL = sum(TASKS.values())


def walk(config: ScheduleConfig, batch: int, start: int = 0, boundary: int | None = None) -> dict[int, Due]:
    """Return what was due at every boundary of a run from `start` on, where `boundary` was the last."""
    schedule, seen, found = Schedule(config, start if boundary is None else boundary, batch), start, {}
    while not schedule.finished(seen):
        seen += batch
        if schedule.at_boundary(seen):
            found[seen] = schedule.due(seen, 1.0, schedule.affordable(), checkpoint_wanted=False)
    return found


def test_each_task_has_its_own_cadence() -> None:
    found = walk(CONFIG, 10)
    assert list(found) == list(range(50, 1_001, 50))
    assert [seen for seen, due in found.items() if due.grid] == list(range(100, 1_001, 100))
    assert [seen for seen, due in found.items() if due.checkpoint] == [200, 400, 600, 800, 1_000]
    assert [seen for seen, due in found.items() if due.evaluation] == [400, 800, 1_000]
    assert [found[seen].task for seen in (50, 100, 200, 400)] == ["", "grid", "checkpoint", "evaluation"]


@given(batch=st.integers(1, 130), boundary=st.integers(0, 12))
def test_a_resumed_run_does_what_the_uninterrupted_one_would(batch: int, boundary: int) -> None:
    whole = walk(CONFIG, batch)
    starts = [0, *whole][:-1]
    start = starts[boundary % len(starts)]
    assert walk(CONFIG, batch, start) == {seen: due for seen, due in whole.items() if seen > start}
    assert all(later - sooner >= batch for sooner, later in pairwise(whole))


@given(batch=st.integers(1, 130), stop=st.integers(1, 200))
def test_so_does_one_that_was_stopped_between_two_boundaries(batch: int, stop: int) -> None:
    whole, seen = walk(CONFIG, batch), batch * stop
    if seen < max(whole):
        boundary = max((at for at in whole if at <= seen), default=0)
        assert walk(CONFIG, batch, seen, boundary) == {at: due for at, due in whole.items() if at > seen}


def test_a_request_saves_where_it_is_agreed_on_and_moves_nothing() -> None:
    schedule = Schedule(CONFIG, 0, 10)
    assert schedule.due(50, 1.0, ALL, checkpoint_wanted=True) == Due(checkpoint=True)
    assert schedule.due(110, 1.0, ALL, checkpoint_wanted=False) == Due(grid=True)
    assert schedule.due(120, 1.0, ALL, checkpoint_wanted=True) == Due(checkpoint=True)
    assert schedule.due(210, 1.0, ALL, checkpoint_wanted=False) == Due(grid=True, checkpoint=True)


def test_what_is_not_affordable_is_done_where_it_becomes_so_and_what_must_be_is_done_always() -> None:
    schedule = Schedule(CONFIG, 0, 10)
    grid, evaluate, checkpoint = TASKS.values()
    assert schedule.due(200, 1.0, grid, checkpoint_wanted=False) == Due(grid=True)
    assert schedule.due(250, 1.0, evaluate, checkpoint_wanted=False) == Due(), "none has come due"
    assert schedule.due(300, 1.0, checkpoint, checkpoint_wanted=False) == Due(checkpoint=True), "due since 200"
    assert schedule.due(350, 1.0, grid, checkpoint_wanted=False) == Due(grid=True), "due since 300"
    assert schedule.due(400, 1.0, 0, checkpoint_wanted=False) == Due()
    assert schedule.due(450, 1.0, 0, checkpoint_wanted=True) == Due(checkpoint=True), "somebody asks for it"
    evaluated = Due(evaluation=True, checkpoint=True)
    assert schedule.due(500, 1.0, evaluate, checkpoint_wanted=False) == evaluated, "the best is chosen from checkpoints"
    assert schedule.due(550, 1.0, ALL, checkpoint_wanted=False) == Due(grid=True), "once for 400 and 500"
    assert schedule.due(1_000, 1.0, 0, checkpoint_wanted=False) == Due(True, True, True), "the end of the run"


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the schedule, to be moved."""
    clock = [1_000.0]
    monkeypatch.setattr("pipeline.training.schedule.time.monotonic", lambda: clock[0])
    return clock


def test_a_task_is_affordable_when_its_cost_is_within_its_share_of_the_time(now: list[float]) -> None:
    schedule = Schedule(CONFIG.model_copy(update={"overhead_share": 0.06}), 0, 10)
    grid, evaluate, checkpoint = TASKS.values()
    assert schedule.affordable() == ALL, "nothing is known yet of what they cost"
    now[0] += 4.0  # they began 4 seconds ago
    schedule.spent({"grid": 1.0, "evaluate": 2.5, "checkpoint": 0.5})
    found = []
    for second in range(4, 200):
        now[0] = 1_000.0 + second
        found.append((second, schedule.affordable()))
    # A third of 0.06 each: 50 times as much time as it costs. The evaluation pays for its checkpoint.
    assert next(second for second, bits in found if bits & grid) == 50
    assert next(second for second, bits in found if bits & checkpoint) == 25
    assert next(second for second, bits in found if bits & evaluate) == 150
    schedule.spent({"checkpoint": 0.5})
    assert schedule.affordable() == grid | evaluate


def test_the_three_together_keep_within_the_share(now: list[float]) -> None:
    config = ScheduleConfig(total_images=10**9, log_every_images=10, overhead_share=0.2)
    every = {f"{name}_every_images": 10 for name in ("grid", "checkpoint", "evaluate")}
    schedule, spent, seen = Schedule(config.model_copy(update=every), 0, 10), 0.0, 0
    while now[0] < 4_000:
        seen += 10
        now[0] += 0.25
        due = schedule.due(seen, 0.1, schedule.affordable(), checkpoint_wanted=False)
        wanted = {"grid": due.grid, "evaluate": due.evaluation, "checkpoint": due.checkpoint}
        costs = {"grid": 0.3, "evaluate": 4.0, "checkpoint": 1.0}
        stopped = {name: costs[name] for name in TASKS if wanted[name]}
        now[0] += sum(stopped.values())
        spent += sum(stopped.values())
        schedule.spent(stopped)
    assert 0.15 < spent / 3_000 < 0.2


def test_a_share_of_1_keeps_to_the_intervals(now: list[float]) -> None:
    schedule = Schedule(CONFIG.model_copy(update={"overhead_share": 1}), 0, 10)
    schedule.spent(dict.fromkeys(TASKS, 1e6))
    assert schedule.affordable() == ALL
    assert schedule.affordable(saving=True) == ALL | SAVING


def test_a_checkpoint_that_is_being_written_puts_off_the_next(now: list[float]) -> None:
    schedule = Schedule(CONFIG, 0, 10)
    assert schedule.affordable(saving=True) == TASKS["grid"] | SAVING
    assert schedule.due(400, 1.0, schedule.affordable(saving=True), checkpoint_wanted=False).task == "grid"
    wanted = schedule.due(420, 1.0, SAVING, checkpoint_wanted=True)
    assert wanted.task == "checkpoint after another checkpoint", "its time says nothing about that of others"
    assert schedule.due(450, 1.0, ALL, checkpoint_wanted=False).task == "evaluation"


@pytest.mark.parametrize(
    ("step_seconds", "steps"), [(1.0, AGREEMENT_SECONDS), (0.3, 16), (4.0, 1), (90.0, 1), (0.0, 100)]
)
def test_ranks_agree_every_few_seconds_however_long_the_interval(step_seconds: float, steps: int) -> None:
    schedule = Schedule(CONFIG.model_copy(update={"log_every_images": 1_000}), 0, 10)
    assert schedule.at_agreement(10), "at once: nothing is known yet about the time of a step"
    schedule.due(10, step_seconds, ALL, checkpoint_wanted=False)
    assert next(step for step in range(1, 200) if schedule.at_agreement(10 + 10 * step)) == min(steps, 99)


@pytest.mark.parametrize(("minutes", "overdue"), [(0, False), (2, True), (3, False)])
def test_minutes_count_from_the_last_checkpoint(minutes: float, overdue: bool, now: list[float]) -> None:
    now[0] = 50.0  # less than the minutes, of which it must be taken off
    schedule = Schedule(CONFIG.model_copy(update={"checkpoint_minutes": minutes}), 0, 10)
    now[0] += 120.0
    assert schedule.checkpoint_overdue is overdue
    schedule.saved()
    assert not schedule.checkpoint_overdue
