"""A window's report: what all ranks act on."""

import math
import signal
import time

import pytest
import torch
from accelerate import Accelerator

from pipeline.common.errors import DataError
from pipeline.training.step import STATISTICS
from pipeline.training.stop_requests import StopRequests
from pipeline.training.window import SCALER_PATIENCE_STEPS, Report, Window

STEPS = SCALER_PATIENCE_STEPS


def report(*, finite: bool = True, **shares: float) -> Report:
    """Return the report of a window in which a statistic had so large a share of the steps."""
    window = Window(Accelerator(cpu=True), StopRequests())
    for step in range(STEPS):
        values = {name: float(step < shares.get(name, 0) * STEPS) for name in STATISTICS}
        values["loss_d"] = float("nan") if values["nonfinite"] else 2.0
        window.add(torch.tensor([*values.values()]), 8, 0.0)
    found = window.reduce(0.0, False, torch.tensor(float(finite)))
    assert not {"nonfinite", "skipped"} & set(found.values)
    return found


def diverged(found: Report) -> bool:
    try:
        found.require_finite("RUN/checkpoints/1")
    except DataError as error:
        return "the last good checkpoint is RUN/checkpoints/1" in str(error)
    return False


def test_what_a_window_reports() -> None:
    """Means over its updates; the diversity is one ratio of sums, not the mean of ratios."""
    before = time.monotonic()
    window = Window(Accelerator(cpu=True), StopRequests())
    first = dict.fromkeys(STATISTICS, 0.0) | {"loss_d": 1.0, "loss_g": 2.0, "d_real": 0.8, "d_fake": 0.1}
    first |= {"grad_norm_d": 5.0, "grad_norm_g": 7.0, "deviation_real": 0.5, "deviation_fake": 0.1}
    second = first | {"loss_d": 3.0, "d_real": 0.6, "deviation_real": 0.3, "deviation_fake": 0.3}
    for statistics in (first, second):
        window.add(torch.tensor([statistics[name] for name in STATISTICS]), 16, 0.25)
    report = window.reduce(1.5, False, torch.ones(()))
    assert 0 <= report.seconds <= time.monotonic() - before
    expected = {"loss_d": 2.0, "loss_g": 2.0, "d_real": 0.7, "d_fake": 0.1, "grad_norm_d": 5.0, "grad_norm_g": 7.0}
    assert report.values == pytest.approx({**expected, "diversity": 0.4 / 0.8})
    assert (report.images, report.steps, report.step_seconds, report.data_wait_seconds) == (32, 2, 0.5, 1.5)
    window.add(torch.full((len(STATISTICS),), 4.0), 16, 0.125)
    report = window.reduce(1.75, True, torch.ones(()))
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
    requests = StopRequests()
    window = Window(Accelerator(cpu=True), requests)
    requests.stop, requests.save = stop, save
    for again in (False, True):
        window.add(torch.zeros(len(STATISTICS)), 8, 0.0)
        found = window.reduce(0.0, overdue, torch.ones(()))
        assert (found.stop, found.save) == ((expected[0], overdue) if again else expected)


def test_a_scale_that_is_found_is_no_reason_to_stop_and_one_that_is_not_is() -> None:
    found, lost = report(skipped=0.5), report(skipped=1.0)
    assert (found.nonfinite_steps, found.hopeless_steps, diverged(found)) == (0, 0, False)
    assert (lost.nonfinite_steps, lost.hopeless_steps, diverged(lost)) == (0, STEPS, True)


@pytest.mark.parametrize(("lost", "stops"), [(0, False), (1, False), (2, True), (8, True)])
def test_one_lost_update_is_outlasted_and_many_are_not(lost: int, stops: bool) -> None:
    found = report(nonfinite=lost / STEPS)
    assert found.nonfinite_steps == lost
    assert diverged(found) is stops
    assert all(math.isfinite(value) for value in found.values.values())


def test_weights_that_are_not_finite_stop_the_run_at_once() -> None:
    assert diverged(report(finite=False))
