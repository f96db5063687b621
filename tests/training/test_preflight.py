"""What is said at the start: idle cores, in words that fit every launcher, and only where there are any."""

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pipeline.training import accelerator, preflight


@pytest.mark.parametrize(
    ("cores", "threads", "processes", "said"),
    [
        (1, 1, 1, []),  # a pod that is limited to one CPU, on a machine of many
        (2, 1, 2, []),
        (4, 1, 2, ["2 of 4 cores in use; OMP_NUM_THREADS=2 uses all"]),
        (5, 4, 1, ["4 of 5 cores in use; OMP_NUM_THREADS=5 uses all"]),
    ],
)
def test_only_cores_that_this_container_has_are_missed(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cores: int,
    threads: int,
    processes: int,
    said: list[str],
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(preflight, "available_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    preflight._warn_about_threads(cast(Any, SimpleNamespace(device=torch.device("cpu"))), processes)
    assert [record.getMessage() for record in caplog.records] == said


def test_torch_gets_no_more_threads_than_the_container_has_cores(
    one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a launcher nobody else tells it."""
    torch.set_num_threads(2)
    monkeypatch.setattr(accelerator, "available_threads", lambda: 1)
    accelerator.make_accelerator()
    assert torch.get_num_threads() == 1
