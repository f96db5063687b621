"""Grids, evaluations and checkpoints beside a training that goes on: what they cost, and what they must not change."""

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from support import TINY
from training_cases import SCHEDULE, hashes

from pipeline.checkpoints.store import CheckpointStore
from pipeline.common.errors import TryAgainError
from pipeline.common.storage import Store
from pipeline.config import load_config
from pipeline.model import ema
from pipeline.training.loop import train
from pipeline.training.manager import CheckpointManager

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_checkpoint_is_of_the_moment_it_was_asked_for_however_late_it_is_written(
    whole_run: Path, faces32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four updates change the weights, and two lines are added, before a byte of it is made."""
    later, share_history = threading.Event(), CheckpointManager._share_history

    def late(*arguments: Any) -> bytes:
        assert later.wait(280)  # until a machine that does much else has made four updates
        return share_history(*arguments)

    def go_on(position: int, *_: object) -> None:
        if position == 192:
            assert not (tmp_path / f"run/checkpoints/{128:012d}/state.json").exists()
            later.set()

    monkeypatch.setattr(CheckpointManager, "_share_history", late)
    config = load_config(overrides=[*TINY, *SCHEDULE, "checkpoint_every_images=128", "total_images=208"])
    train(config, data=str(faces32), out=tmp_path / "run", on_batch=go_on)
    assert hashes(tmp_path / "run", 128) == hashes(whole_run, 128)


@pytest.mark.parametrize("fails_at", [16, 48])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(
    fails_at: int, faces32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next log boundary, or at the end, as if the loop had written it."""
    save = CheckpointStore.save

    def full(store: CheckpointStore, images_seen: int, *arguments: Any) -> str:
        if images_seen == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights")
        return save(store, images_seen, *arguments)

    monkeypatch.setattr(CheckpointStore, "save", full)
    schedule = ("total_images=48", "log_every_images=16", "checkpoint_every_images=16", "evaluate_samples=64")
    seen: list[int] = []
    with pytest.raises((OSError, TryAgainError), match="No space left on device"):
        train(
            load_config(overrides=[*TINY, *schedule]),
            data=str(faces32),
            out=tmp_path / "run",
            on_batch=lambda position, *_: seen.append(position),
        )
    assert seen == ([0, 16] if fails_at == 16 else [0, 16, 32])
    kept = CheckpointStore(Store(tmp_path / "run")).names()
    assert kept == [f"{images:012d}" for images in (16, 32) if fails_at == 48]


def test_what_costs_too_much_is_done_first_and_last_and_leaves_the_weights_alone(
    whole_run: Path, faces32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimate, estimates = ema.estimate_batchnorm, []

    def counted(*given: Any) -> Any:
        estimates.append(given)
        return estimate(*given)

    monkeypatch.setattr(ema, "estimate_batchnorm", counted)
    config = load_config(overrides=[*TINY, *SCHEDULE, "evaluate_every_images=64", "overhead_share=1e-6"])
    train(config, data=str(faces32), out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines if "loss_d" in line] == list(range(32, 257, 32))
    assert [line["images"] for line in lines if "swd" in line] == [64, 256]
    assert sorted(path.name for path in (tmp_path / "run/samples").iterdir()) == ["000000000.png", "000000256.png"]
    assert CheckpointStore(Store(tmp_path / "run")).names() == [f"{images:012d}" for images in (64, 256)]
    assert len(estimates) == 3, "one for all that is due at 0, at 64 and at 256"
    different = dict(hashes(tmp_path / "run", 256).items() ^ hashes(whole_run, 256).items())
    assert set(different) == {"metrics.jsonl"}
    timing = [json.loads(line) for line in (tmp_path / "run/timing.jsonl").read_text().splitlines()]
    stopped = {line["images"]: {name for name in line if name.endswith("_seconds")} for line in timing}
    assert stopped[0] == {"grid_seconds"}
    assert stopped[256] == {"grid_seconds", "evaluate_seconds", "checkpoint_seconds"}
