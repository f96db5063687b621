"""A window's report: what all ranks act on."""

import torch
from accelerate import Accelerator

from pipeline.training.step import STATISTICS
from pipeline.training.stop_requests import StopRequests
from pipeline.training.window import SCALER_PATIENCE_STEPS, Window


def report(**shares: float) -> tuple[int, int]:
    """Return (non-finite, hopeless) of an interval in which a statistic had so large a share of the steps."""
    window = Window(Accelerator(cpu=True), StopRequests())
    for step in range(SCALER_PATIENCE_STEPS):
        values = [float(step < shares.get(name, 0) * SCALER_PATIENCE_STEPS) for name in STATISTICS]
        window.add(torch.tensor(values), 8, 0.0)
    found = window.reduce(0.0, False)
    assert not {"nonfinite", "skipped"} & set(found.values)
    return found.nonfinite_steps, found.hopeless_steps


def test_a_scale_that_is_found_is_no_reason_to_stop_and_one_that_is_not_is() -> None:
    assert report(skipped=0.5) == (0, 0)
    assert report(skipped=1.0) == (0, SCALER_PATIENCE_STEPS)
    assert report(nonfinite=0.25) == (SCALER_PATIENCE_STEPS // 4, 0)
