"""What the tests of whole runs share: a schedule of seconds, and how a run is watched and compared."""

import json
import os
import time
from pathlib import Path

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
SCHEDULE = (
    "schedule.total_images=256",
    "schedule.log_every_images=32",
    "schedule.grid_every_images=128",
    "schedule.checkpoint_every_images=64",
    "schedule.evaluate_every_images=128",
    "schedule.evaluate_samples=64",
)


def hashes(run: Path, images: int) -> dict[str, str]:
    """Return the SHA-256 of every file of a checkpoint: weights, average, optimizers, metrics so far."""
    state = json.loads((run / "checkpoints" / f"{images:012d}" / "state.json").read_text())
    files: dict[str, str] = state["files"]
    return files


def wait_for_lines(out: Path, count: int) -> None:
    """Wait until metrics.jsonl has `count` lines."""
    for _ in range(1200):
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_bytes().splitlines()) >= count:
            return
        time.sleep(0.1)
    raise AssertionError("the run did not get that far")
