"""What all ranks do together: fail at once with the words of the one that failed, and average statistics."""

import os
import re
import sys
from pathlib import Path

import accelerate
import pytest
import warm_start
from support import Trainer

from pipeline.common.errors import ConfigConflict
from pipeline.training.accelerator import REFUSED_SETTINGS, check_environment

CASES: dict[str, tuple[str, str, list[str]]] = {
    "all well": ("()", "None", ["0 returned 0", "1 returned 1"]),
    "one": ("(1,)", "Damaged('shard', 3)", [f"{rank} DataError 65 True rank 1: shard at 3" for rank in (0, 1)]),
    "both": ("(0, 1)", "DataError('x: gone')", [f"{rank} DataError 65 True x: gone" for rank in (0, 1)]),
    "disk": (
        "(0,)",
        "OSError(28, 'No space left on device', 'f')",
        [f"{rank} TryAgainError 75 True rank 0: f: No space left on device" for rank in (0, 1)],
    ),
    "bug": (
        "(1,)",
        "ZeroDivisionError('bug')",
        ["0 TryAgainError 75 True rank 1: bug", "1 ZeroDivisionError 1 False bug"],
    ),
}
"""Which ranks raise what, and what then is seen on both."""

FAIL_TOGETHER = """
class Damaged(DataError):
    def __init__(self, what, where):
        super().__init__(f"{what} at {where}")

def fail(ranks, error):
    def work():
        if rank in ranks:
            raise error
        return rank
    try:
        result = together(accelerator, work)
    except Exception as error:
        kind, code, shared = type(error).__name__, getattr(error, "exit_code", 1), getattr(error, "on_all_ranks", False)
        return f"{kind} {code} {shared} {error}"
    return f"returned {result}"
"""

AVERAGE = """
network = nn.Sequential(SpectralConv2d(1, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(3))
average_batchnorm(network[0], accelerator)  # which has none
network[0].u += rank
network[1].running_mean += torch.tensor([1.0, 3.0]) * (rank + 1)
network[2].running_var *= 1 + 2 * rank
network[1].num_batches_tracked += 5 + rank
average_batchnorm(network, accelerator)
means, variances = network[1].running_mean.tolist(), network[2].running_var.tolist()
say("average", f"{means} {variances} {int(network[1].num_batches_tracked)} {bool((network[0].u > 1).all())}")
"""

TALK = """
peers.tell("nothing yet")
peers.tell(f"this is {rank}")
wait_for_all(accelerator)
say("talk", f"{peers.listen()} {peers.listen()}")
"""

STOP_INSIDE_A_WINDOW = """
requests, finite = StopRequests(), torch.ones(())
steps = torch.rand(5, len(STATISTICS), generator=torch.Generator().manual_seed(rank)) / 3
sums = [torch.zeros(len(STATISTICS)) for _ in range(3)]
whole, stopped = (Window(accelerator, requests, sums[which], 0, None) for which in range(2))
for index, step in enumerate(steps):
    if index == 2:
        stopped = Window(accelerator, requests, sums[2], 32, Checkpoint("here", stopped.state(), {}))
    for window, total in ((whole, sums[0]), (stopped, sums[1 + (index >= 2)])):
        total += step
        window.add(16, 0.1)
reports = [window.reduce(0.0, False, finite, end=True, affordable=6 * (rank == 0)) for window in (whole, stopped)]
whole, stopped = (report.values for report in reports)
say("window", whole == stopped)
say("affordable", [report.affordable for report in reports])
"""

BEGIN = """
import os
import torch
from accelerate import Accelerator
from torch import nn
from pipeline.checkpoints.store import Checkpoint
from pipeline.common.errors import DataError
from pipeline.model.spectral import SpectralConv2d
from pipeline.training.accelerator import average_batchnorm, meet_peers, together, wait_for_all
from pipeline.training.step import STATISTICS
from pipeline.training.stop_requests import StopRequests
from pipeline.training.window import Window

peers = meet_peers()
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index

def say(what, words):  # at once: print would let the other rank in between
    os.write(1, f"{what}: {rank} {words}\\n".encode())
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What two ranks said of each piece of work, in the order of the ranks. They start once for all of it."""
    worker = tmp_path_factory.mktemp("worker") / "worker.py"
    fails = "".join(f"say({name!r}, fail({ranks}, {error}))\n" for name, (ranks, error, _) in CASES.items())
    worker.write_text(BEGIN + AVERAGE + TALK + STOP_INSIDE_A_WINDOW + FAIL_TOGETHER + fails + "os._exit(0)\n")
    ranks = warm_start.run_ranks([sys.executable, worker], 2, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    found: dict[str, list[str]] = {}
    for line in sorted(line for rank in ranks for line in rank.stdout.splitlines()):
        what, words = line.split(": ", 1)
        found.setdefault(what, []).append(words)
    return found


@pytest.mark.parametrize("case", CASES)
def test_all_raise_what_one_raises(said: dict[str, list[str]], case: str) -> None:
    for found, wanted in zip(said[case], CASES[case][2], strict=True):
        assert found.startswith(wanted)


def test_running_statistics_become_the_mean_over_ranks(said: dict[str, list[str]]) -> None:
    assert said["average"] == [f"{rank} [1.5, 4.5] [2.0, 2.0, 2.0] {5 + rank} {rank == 1}" for rank in (0, 1)]


def test_ranks_hear_what_each_has_told_last_and_once(said: dict[str, list[str]]) -> None:
    assert said["talk"] == ["0 {1: 'this is 1'} {}", "1 {0: 'this is 0'} {}"]


def test_rank_0_decides_for_both_what_is_affordable(said: dict[str, list[str]]) -> None:
    assert said["affordable"] == ["0 [6, 6]", "1 [6, 6]"]


def test_two_ranks_go_on_inside_a_window_bit_by_bit(said: dict[str, list[str]]) -> None:
    assert said["window"] == ["0 True", "1 True"]


@pytest.mark.parametrize("name", REFUSED_SETTINGS)
def test_a_setting_of_accelerate_that_training_ignores_is_refused(name: str) -> None:
    allowed, instead = REFUSED_SETTINGS[name]
    check_environment({})
    for value in allowed:
        check_environment({name: value.upper()})
    for value in ("true", "4", "fp8", "inductor"):
        with pytest.raises(ConfigConflict, match=f"{name}={value}: .*{instead}"):
            check_environment({name: value})


def test_every_engine_that_accelerate_can_switch_to_is_known() -> None:
    source = Path(accelerate.accelerator.__file__).read_text()
    assert set(re.findall(r"ACCELERATE_USE_[A-Z_]+", source)) - {"ACCELERATE_USE_CPU"} <= set(REFUSED_SETTINGS)


def test_the_trainer_refuses_gradient_accumulation_of_accelerate(
    faces32: Path, tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    done = trainer(faces32, tmp_path / "run")
    assert done.returncode == 78, done.stderr
    assert done.stderr.startswith("error: ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4: ")
    assert not (tmp_path / "run").exists()
