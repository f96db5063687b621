"""metrics.jsonl comes back byte for byte, from checkpoints that share all of it but its end."""

import json
import shutil
from pathlib import Path

import pytest
from support import TINY

from pipeline.checkpoints.store import HISTORY, STATE, CheckpointStore
from pipeline.common.storage import Store
from pipeline.config import load_config
from pipeline.training import manager
from pipeline.training.loop import train

PART = 300
SCHEDULE = (
    "schedule.total_images=160",
    "schedule.log_every_images=16",
    "schedule.checkpoint_every_images=48",
    "schedule.evaluate_samples=64",
)


class Killed(BaseException):
    """Nothing handles it, and nothing is saved."""


def run(data: Path, out: Path, *, kill_at: int | None = None, mirror: Path | None = None) -> None:
    """Train in this process; `kill_at` ends it before the update at that position."""

    def strike(position: int, *_: object) -> None:
        if position == kill_at:
            raise Killed

    config = load_config(overrides=[*TINY, *SCHEDULE])
    train(config, data=str(data), out=out, mirror=f"file://{mirror}" if mirror else None, on_batch=strike)


def told(out: Path, images: int = 160) -> dict[str, object]:
    """Return what a checkpoint says of its files and of the history before them."""
    state = json.loads((out / f"checkpoints/{images:012d}" / STATE).read_text())
    return {"files": state["files"], HISTORY: state[HISTORY]}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "PART_BYTES", PART)


def test_history_is_shared_and_restored_byte_for_byte(
    faces32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    whole, out, mirror = tmp_path / "whole", tmp_path / "run", tmp_path / "mirror"
    run(faces32, whole)
    lines = (whole / "metrics.jsonl").read_bytes()
    assert len(lines) > 5 * PART
    longest = max(map(len, lines.splitlines(keepends=True)))
    for folder in (whole / "checkpoints").glob("0*"):
        assert (folder / "metrics.jsonl").stat().st_size <= PART
    for part in (whole / "checkpoints" / HISTORY).iterdir():
        assert PART < part.stat().st_size <= PART + longest
        assert part.read_bytes().endswith(b"}\n")

    # Killed beyond a checkpoint, twice; the second time the disk is lost as well.
    with pytest.raises(Killed):
        run(faces32, out, kill_at=80, mirror=mirror)
    with pytest.raises(Killed):
        run(faces32, out, kill_at=128, mirror=mirror)
    assert out.joinpath("metrics.jsonl").read_bytes() == b"".join(lines.splitlines(keepends=True)[:8])
    shutil.rmtree(out)
    run(faces32, out, mirror=mirror)
    assert (out / "metrics.jsonl").read_bytes() == lines
    assert told(out) == told(whole)

    # A checkpoint of 0.1.0, which holds all lines, goes on in parts.
    name, before = f"{144:012d}", tmp_path / "before"
    shutil.copytree(whole, before)
    store = CheckpointStore(Store(before))
    checkpoint = store.load(name)
    old = b"".join([*store.read_parts(checkpoint.history), checkpoint.files["metrics.jsonl"]])
    assert lines.startswith(old)
    kept = {key: value for key, value in checkpoint.state.items() if key not in ("files", HISTORY)}
    store.save(144, {**checkpoint.files, "metrics.jsonl": old}, kept)
    shutil.rmtree(store.path(HISTORY))
    store.discard_after(144)
    run(faces32, before)
    assert (before / "metrics.jsonl").read_bytes() == lines
    assert told(before) == told(whole)
