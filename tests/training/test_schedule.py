"""What is due follows from images seen, wherever a run was resumed, and from the minutes since the last checkpoint."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ScheduleConfig
from pipeline.training.schedule import AGREEMENT_SECONDS, Due, Schedule

CONFIG = ScheduleConfig(
    total_images=1_000,
    log_every_images=50,
    grid_every_images=100,
    checkpoint_every_images=200,
    evaluate_every_images=400,
)


def walk(config: ScheduleConfig, batch: int, start: int = 0, boundary: int | None = None) -> dict[int, Due]:
    """Return what was due at every boundary of a run from `start` on, where `boundary` was the last."""
    schedule, seen, found = Schedule(config, start if boundary is None else boundary, batch), start, {}
    while not schedule.finished(seen):
        seen += batch
        if schedule.at_boundary(seen):
            found[seen] = schedule.due(seen, 1.0, checkpoint_wanted=False)
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
    assert schedule.due(50, 1.0, checkpoint_wanted=True) == Due(grid=False, evaluation=False, checkpoint=True)
    assert schedule.due(110, 1.0, checkpoint_wanted=False) == Due(grid=True, evaluation=False, checkpoint=False)
    assert schedule.due(120, 1.0, checkpoint_wanted=True) == Due(grid=False, evaluation=False, checkpoint=True)
    assert schedule.due(210, 1.0, checkpoint_wanted=False) == Due(grid=True, evaluation=False, checkpoint=True)


@pytest.mark.parametrize(
    ("step_seconds", "steps"), [(1.0, AGREEMENT_SECONDS), (0.3, 16), (4.0, 1), (90.0, 1), (0.0, 100)]
)
def test_ranks_agree_every_few_seconds_however_long_the_interval(step_seconds: float, steps: int) -> None:
    schedule = Schedule(CONFIG.model_copy(update={"log_every_images": 1_000}), 0, 10)
    assert schedule.at_agreement(10), "at once: nothing is known yet about the time of a step"
    schedule.due(10, step_seconds, checkpoint_wanted=False)
    assert next(step for step in range(1, 200) if schedule.at_agreement(10 + 10 * step)) == min(steps, 99)


@pytest.mark.parametrize(("minutes", "overdue"), [(0, False), (2, True), (3, False)])
def test_minutes_count_from_the_last_checkpoint(minutes: float, overdue: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_000.0]
    monkeypatch.setattr("pipeline.training.schedule.time.monotonic", lambda: now[0])
    schedule = Schedule(CONFIG.model_copy(update={"checkpoint_minutes": minutes}), 0, 10)
    now[0] += 130.0
    assert schedule.checkpoint_overdue is overdue
    schedule.saved()
    assert not schedule.checkpoint_overdue
