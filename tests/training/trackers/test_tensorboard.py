"""A run that is killed and resumed is one run in TensorBoard: no step twice, none missing."""

import json
import signal
import sys
from pathlib import Path

import pytest
import warm_start
from support import TINY, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_cases import ENVIRONMENT, SCHEDULE

KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.config import load_config
from pipeline.training.loop import train
data, out, at, *overrides = sys.argv[1:]
def strike(position, reals, z):
    if position == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
train(load_config(overrides=overrides), data=data, out=Path(out), on_batch=strike, log_with=("tensorboard",))
"""


def test_killed_before_and_after_a_checkpoint(faces32: Path, tmp_path: Path, trainer: Trainer) -> None:
    out, script = tmp_path / "run", tmp_path / "killed.py"
    script.write_text(KILLED)
    for at in ("48", "176"):
        command = [sys.executable, str(script), str(faces32), str(out), at, *TINY, *SCHEDULE]
        done = warm_start.run(command, env=ENVIRONMENT, timeout=240)
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = trainer(faces32, out, *SCHEDULE, options=["--log-with", "tensorboard"])
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    board = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()
    for name in ("loss_d", "swd"):
        logged = [(event.step, event.value) for event in board.Scalars(name)]
        assert logged == [(line["images"], pytest.approx(line[name])) for line in lines if name in line]
    assert [event.step for event in board.Images("samples")] == [0, 128, 256]
    assert board.Images("samples")[-1].encoded_image_string[1:4] == b"PNG"
    assert "config/text_summary" in board.Tags()["tensors"]
