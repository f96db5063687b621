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

WORKER = """
import os, sys
from accelerate import Accelerator
from pipeline.common.errors import DataError
from pipeline.training.accelerator import together

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index

class Damaged(DataError):
    def __init__(self, what, where):
        super().__init__(f"{what} at {where}")

def work():
    if rank in RANKS:
        raise ERROR
    return rank

try:
    result = together(accelerator, work)
except Exception as error:
    code = getattr(error, "exit_code", 1)
    line = f"{rank} {type(error).__name__} {code} {getattr(error, 'on_all_ranks', False)} {error}"
else:
    line = f"{rank} returned {result}"
os.write(1, f"{line}\\n".encode())  # at once: print would let the other rank in between
os._exit(0)
"""


def start(tmp_path: Path, code: str) -> list[str]:
    """Run `code` in two ranks; return what each of them printed, in order."""
    worker = tmp_path / "worker.py"
    worker.write_text(code)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    ranks = warm_start.run_ranks([sys.executable, worker], 2, env=environment)
    return [done.stdout.rstrip() for done in ranks]


@pytest.mark.parametrize(
    ("ranks", "error", "expected"),
    [
        ("()", "None", ["0 returned 0", "1 returned 1"]),
        ("(1,)", "Damaged('shard', 3)", [f"{rank} DataError 65 True rank 1: shard at 3" for rank in (0, 1)]),
        ("(0, 1)", "DataError('x: gone')", [f"{rank} DataError 65 True x: gone" for rank in (0, 1)]),
        (
            "(0,)",
            "OSError(28, 'No space left on device', 'f')",
            [f"{rank} TryAgainError 75 True rank 0: f: No space left on device" for rank in (0, 1)],
        ),
        (
            "(1,)",
            "ZeroDivisionError('bug')",
            ["0 TryAgainError 75 True rank 1: bug", "1 ZeroDivisionError 1 False bug"],
        ),
    ],
    ids=["all well", "one", "both", "disk", "bug"],
)
def test_all_raise_what_one_raises(tmp_path: Path, ranks: str, error: str, expected: list[str]) -> None:
    for found, wanted in zip(
        start(tmp_path, WORKER.replace("RANKS", ranks).replace("ERROR", error)), expected, strict=True
    ):
        assert found.startswith(wanted)


AVERAGE = """
import os
import torch
from accelerate import Accelerator
from torch import nn
from pipeline.training.accelerator import average_batchnorm

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(3))
network[1].running_mean += torch.tensor([1.0, 3.0]) * (rank + 1)
network[2].running_var *= 1 + 2 * rank
network[1].num_batches_tracked += 5 + rank
average_batchnorm(network, accelerator)
means, variances = network[1].running_mean.tolist(), network[2].running_var.tolist()
os.write(1, f"{rank} {means} {variances} {int(network[1].num_batches_tracked)}\\n".encode())
os._exit(0)
"""


def test_running_statistics_become_the_mean_over_ranks(tmp_path: Path) -> None:
    expected = [f"{rank} [1.5, 4.5] [2.0, 2.0, 2.0] {5 + rank}" for rank in (0, 1)]
    assert start(tmp_path, AVERAGE) == expected


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
