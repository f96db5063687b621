"""A window's report: what all ranks act on; and its state, with which a run goes on that was stopped inside it."""

import dataclasses
import json
import math
import signal
import time
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from pipeline.checkpoints.store import Checkpoint
from pipeline.common.errors import DataError
from pipeline.training.step import STATISTICS
from pipeline.training.stop_requests import StopRequests
from pipeline.training.window import SCALER_PATIENCE_STEPS, Report, Window

STEPS = SCALER_PATIENCE_STEPS


def new_window(images_seen: int = 0, saved: Any = None) -> Window:
    """Return a window that begins at a position, or goes on with what a checkpoint there has saved."""
    checkpoint = None if saved is None else Checkpoint("RUN/checkpoints/1", json.loads(json.dumps(saved)), {})
    return Window(Accelerator(cpu=True), StopRequests(), torch.zeros(len(STATISTICS)), images_seen, checkpoint)


def add(window: Window, statistics: torch.Tensor, images: int = 16, seconds: float = 0.1) -> None:
    """Do what an update and the loop after it do."""
    window._totals += statistics
    window.add(images, seconds)


def report(*, finite: bool = True, end: bool = True, steps: int = STEPS, **shares: float) -> Report:
    """Return the report of a window in which a statistic had so large a share of the steps."""
    window = new_window()
    for step in range(steps):
        values = {name: float(step < shares.get(name, 0) * steps) for name in STATISTICS}
        values["loss_d"] = 0.0 if values["nonfinite"] else 2.0
        add(window, torch.tensor([*values.values()]), 8, 0.0)
    found = window.reduce(0.0, False, torch.tensor(float(finite)), end=end)
    assert not {"nonfinite", "skipped"} & set(found.values)
    return found


def diverged(found: Report) -> bool:
    try:
        found.require_finite(lambda: "RUN/checkpoints/1")
    except DataError as error:
        return "the last good checkpoint is RUN/checkpoints/1" in str(error)
    return False


def test_what_a_window_reports() -> None:
    """Means over its updates; the diversity is one ratio of sums, not the mean of ratios."""
    before = time.monotonic()
    window = new_window()
    first = dict.fromkeys(STATISTICS, 0.0) | {"loss_d": 1.0, "loss_g": 2.0, "d_real": 0.8, "d_fake": 0.1}
    first |= {"grad_norm_d": 5.0, "grad_norm_g": 7.0, "deviation_real": 0.5, "deviation_fake": 0.1}
    second = first | {"loss_d": 3.0, "d_real": 0.6, "deviation_real": 0.3, "deviation_fake": 0.3}
    for statistics in (first, second):
        add(window, torch.tensor([statistics[name] for name in STATISTICS]), 16, 0.25)
    report = window.reduce(1.5, False, torch.ones(()), end=True)
    assert 0 <= report.seconds <= time.monotonic() - before
    expected = {"loss_d": 2.0, "loss_g": 2.0, "d_real": 0.7, "d_fake": 0.1, "grad_norm_d": 5.0, "grad_norm_g": 7.0}
    assert report.values == pytest.approx({**expected, "diversity": 0.4 / 0.8})
    assert (report.images, report.steps, report.step_seconds, report.data_wait_seconds) == (32, 2, 0.5, 1.5)
    add(window, torch.full((len(STATISTICS),), 4.0), 16, 0.125)
    report = window.reduce(1.75, True, torch.ones(()), end=True)
    assert report.values == pytest.approx({**dict.fromkeys(expected, 4.0), "diversity": 1.0}), "it began anew"
    assert (report.images, report.steps, report.step_seconds, report.data_wait_seconds) == (16, 1, 0.125, 0.25)


@pytest.mark.parametrize(
    ("stop", "save", "overdue", "expected"),
    [
        (0, False, False, (0, False)),
        (signal.SIGINT, False, False, (signal.SIGINT, False)),
        (signal.SIGTERM, True, False, (signal.SIGTERM, True)),
        (0, False, True, (0, True)),
    ],
)
def test_a_request_is_reported_and_one_to_save_only_once(
    stop: int, save: bool, overdue: bool, expected: tuple[int, bool]
) -> None:
    window = new_window()
    requests = window.requests
    requests.stop, requests.save = stop, save
    for again in (False, True):
        add(window, torch.zeros(len(STATISTICS)), 8, 0.0)
        found = window.reduce(0.0, overdue, torch.ones(()), end=True, affordable=5)
        assert found.affordable == 5
        assert (found.stop, found.save) == ((expected[0], overdue) if again else expected)


def test_a_scale_that_is_found_is_no_reason_to_stop_and_one_that_is_not_is() -> None:
    found, lost = report(skipped=0.5), report(skipped=1.0)
    assert (found.nonfinite_steps, found.hopeless_steps, diverged(found)) == (0, 0, False)
    assert (lost.nonfinite_steps, lost.hopeless_steps, diverged(lost)) == (0, STEPS, True)


@pytest.mark.parametrize(
    ("lost", "steps", "stops"),
    [(0, 8, False), (1, 8, False), (2, 8, True), (8, 8, True), (5, 100, False), (6, 100, True)],
)
def test_one_lost_update_or_a_twentieth_is_outlasted_and_more_are_not(lost: int, steps: int, stops: bool) -> None:
    found = report(nonfinite=lost / steps, steps=steps)
    assert found.nonfinite_steps == lost
    assert diverged(found) is stops
    assert all(math.isfinite(value) for value in found.values.values())


def test_weights_that_are_not_finite_stop_the_run_at_once() -> None:
    assert diverged(report(finite=False))


def test_losses_of_an_unfinished_window_wait_for_its_end_and_broken_weights_for_a_save() -> None:
    assert not diverged(report(nonfinite=0.5, end=False))
    assert not diverged(report(skipped=1.0, end=False))
    lost = report(finite=False, end=False)
    assert not diverged(lost), "the log boundary ends the run, with the line that shows it"
    assert diverged(dataclasses.replace(lost, save=True))
    assert diverged(dataclasses.replace(lost, stop=15))


def test_a_window_that_was_stopped_goes_on_bit_by_bit() -> None:
    steps = torch.rand(9, len(STATISTICS), generator=torch.Generator().manual_seed(1)) / 3
    whole, stopped = new_window(64), new_window(64)
    for index, step in enumerate(steps):
        add(whole, step)
        add(stopped, step)
        if index in (2, 6):
            stopped.reduce(0.0, False, torch.tensor(1.0), end=False)
            stopped = new_window(64 + 16 * (index + 1), stopped.state())
            assert stopped.begin == 64
    found, expected = (window.reduce(0.0, False, torch.tensor(1.0), end=True) for window in (stopped, whole))
    assert (found.values, found.steps) == (expected.values, expected.steps)
    assert (found.images, expected.images) == (32, 144), "a rate counts what this process did"
    assert (stopped.begin, stopped.state()) == (208, {}), "nothing is saved of a window at its end"


def test_another_number_of_ranks_goes_on_with_the_same_means() -> None:
    two = [[value] * len(STATISTICS) for value in (1.0, 3.0)]
    window = new_window(32, {"window": {"begin": 0, "steps": 2, "totals": two}})
    add(window, torch.full((len(STATISTICS),), 4.0))
    assert window.reduce(0.0, False, torch.tensor(1.0), end=True).values["loss_d"] == 2.0  # (1 + 3) / 2 + 4, of 3 steps


@pytest.mark.parametrize(
    "change",
    [
        {"begin": 32},
        {"begin": None},
        {"steps": 0},
        {"steps_of": [-1, 2]},
        {"steps_of": [0, 3]},
        {"totals": [[1.0]]},
        {"totals": []},
        {"totals": "x"},
    ],
)
def test_a_damaged_window_is_named(change: dict[str, Any]) -> None:
    good = {"begin": 0, "steps": 2, "totals": [[1.0] * len(STATISTICS)]}
    new_window(32, {"window": good})
    new_window(32, {"window": good | {"steps_of": [2, 0]}})  # updates in turn, before the first of G
    with pytest.raises(DataError, match=r"^RUN/checkpoints/1/state.json: its entry `window` is damaged"):
        new_window(32, {"window": good | change})
    with pytest.raises(DataError):
        new_window(32, {"window": [good]})
