"""A run that is killed, stopped, moved or cut to other processes ends as if nothing had happened to it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import warm_start
from support import TINY, Trainer, write_dataset
from training_cases import ENVIRONMENT, SCHEDULE, hashes, wait_for_lines

from pipeline.common.errors import Stopped
from pipeline.config import load_config
from pipeline.training import schedule
from pipeline.training.loop import train


@pytest.mark.parametrize("lines", [1, 4])
def test_killed_and_resumed_equals_uninterrupted(
    started: tuple[subprocess.Popen[str], Path], faces32: Path, whole_run: Path, trainer: Trainer, lines: int
) -> None:
    process, out = started
    wait_for_lines(out, lines)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [out / ".config.json.1.tmp", out / "samples/.a.png.1.tmp", out / f"checkpoints/{256:012d}/.o.pt.1.tmp"]
    for path in left:  # as a kill in the middle of a write leaves it
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    done = trainer(faces32, out, *SCHEDULE)
    assert done.returncode == 0, done.stderr
    assert not any(path.exists() for path in left)
    assert json.loads((out / "config.json").read_text())["starts"] == 2
    assert hashes(out, 256) == hashes(whole_run, 256)
    assert (out / "metrics.jsonl").read_bytes() == (whole_run / "metrics.jsonl").read_bytes()
    for grid in (whole_run / "samples").iterdir():
        assert (out / "samples" / grid.name).read_bytes() == grid.read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_signal_saves_and_the_run_goes_on(
    started: tuple[subprocess.Popen[str], Path],
    faces32: Path,
    whole_run: Path,
    trainer: Trainer,
    number: signal.Signals,
    code: int,
) -> None:
    process, out = started
    wait_for_lines(out, 1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert "run it again to resume" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert list((out / "checkpoints").glob("*/state.json"))
    done = trainer(faces32, out)  # the run knows its own settings
    assert done.returncode == 0, done.stderr
    assert "resuming at image" in done.stderr
    assert hashes(out, 256) == hashes(whole_run, 256)


def test_a_stop_between_two_log_boundaries_makes_no_difference(
    whole_run: Path, faces32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setattr(schedule, "AGREEMENT_SECONDS", 0.0)  # at every step
    config, out = load_config(overrides=[*TINY, *SCHEDULE]), tmp_path / "run"
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    for position, saved in {0: 16, 128: 144, 208: 224}.items():

        def stop(at: int, *_: object, position: int = position) -> None:
            if at == position:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Stopped, match=f"at image {saved}, "):
            train(config, data=str(faces32), out=out, on_batch=stop)
        state = json.loads((out / "checkpoints" / f"{saved:012d}" / "state.json").read_text())
        assert ("window" in state) is (saved % 32 == 16)
    train(config, data=str(faces32), out=out)
    assert [signal.getsignal(number) for number in numbers] == handlers
    assert hashes(out, 256) == hashes(whole_run, 256)
    assert (out / "metrics.jsonl").read_bytes() == (whole_run / "metrics.jsonl").read_bytes()


def test_a_finished_run_says_so_at_once_and_copies_what_its_mirror_lacks(
    whole_run: Path, faces32: Path, trainer: Trainer, tmp_path: Path
) -> None:
    out, mirror = tmp_path / "copy", tmp_path / "mirror"
    shutil.copytree(whole_run, out)
    done = trainer(faces32, out, *SCHEDULE, options=["--mirror", str(mirror)])
    assert done.returncode == 0
    assert "done: 256 images" in done.stderr
    assert hashes(out, 256) == hashes(mirror, 256) == hashes(whole_run, 256)


WORKER = """
import json, sys, pathlib
import numpy as np
from accelerate import PartialState
from pipeline.config import load_config
from pipeline.training.loop import train
data, out, record, processes, *overrides = sys.argv[1:]
batches = []
def note(position, reals, z):
    batches.append((position, [r.tobytes().hex()[:64] for r in reals], z.tobytes().hex()))
train(load_config(overrides=overrides), data=data, out=pathlib.Path(out), on_batch=note)
state = PartialState()
assert state.num_processes == int(processes), state.num_processes
pathlib.Path(f"{record}.{state.process_index}").write_text(json.dumps(batches))
"""


def test_two_processes_see_the_images_and_z_of_one(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", images=150)  # 20 batches of 16 pass the end of the epoch twice
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    overrides = [*TINY, "schedule.total_images=320", "schedule.evaluate_samples=64"]
    records: dict[int, list[list[Any]]] = {}
    for processes in (1, 2):
        record = tmp_path / f"record{processes}"
        arguments = [str(data), str(tmp_path / f"run{processes}"), str(record), str(processes), *overrides]
        warm_start.run_ranks([sys.executable, worker, *arguments], processes, env=ENVIRONMENT)
        records[processes] = [json.loads(Path(f"{record}.{rank}").read_text()) for rank in range(processes)]
    one, (first, second) = records[1][0], records[2]
    assert len(one) == 20
    width = 8 * 4 * 2  # hexadecimal digits of one z
    for (position, images, z), even, odd in zip(one, first, second, strict=True):
        assert position == even[0] == odd[0]
        assert images[0::2] == even[1]
        assert images[1::2] == odd[1]
        rows = [z[start : start + width] for start in range(0, len(z), width)]
        assert "".join(rows[0::2]) == even[2]
        assert "".join(rows[1::2]) == odd[2]
    assert len({image for _, images, _ in one for image in images}) > 140


@pytest.mark.parametrize(
    ("overrides", "options", "code", "words"),
    [
        (["recipe.batch=32"], [], 78, ["recipe.batch 16 -> 32", "--allow-change recipe.batch"]),
        (["recipe.seed=3", "network.width=8"], [], 78, ["network.width 4 -> 8", "recipe.seed 0 -> 3"]),
        ([], ["--resume", "never"], 78, ["--resume never", "another --out"]),
        ([], ["--allow-change", "bach"], 2, ["bach", "recipe.batch"]),
    ],
)
def test_a_changed_identity_is_refused_with_the_difference(
    whole_run: Path,
    faces32: Path,
    trainer: Trainer,
    overrides: list[str],
    options: list[str],
    code: int,
    words: list[str],
) -> None:
    done = trainer(faces32, whole_run, *SCHEDULE, *overrides, options=options)
    assert done.returncode == code, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert all(word in last for word in words), last
    assert "Traceback" not in done.stderr


def test_an_allowed_change_goes_on(whole_run: Path, faces32: Path, trainer: Trainer, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(whole_run, out)
    options = ["--allow-change", "recipe.batch,recipe.learning_rate_g"]
    done = trainer(
        faces32,
        out,
        *SCHEDULE,
        "schedule.total_images=320",
        "recipe.batch=32",
        "recipe.learning_rate_g=1e-4",
        options=options,
    )
    assert done.returncode == 0, done.stderr
    assert "recipe.batch 16 -> 32" in done.stderr
    assert hashes(out, 320)
