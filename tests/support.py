"""Helpers for several rooms: small real data sets, and the trainer as a command."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import warm_start

from pipeline.common.imaging import encode
from pipeline.common.storage import Store
from pipeline.data.dataset import DATASET_FILE, Dataset, Encoding
from pipeline.data.shard_writer import ShardWriter, write_shard

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "network.image_size=32",
    "network.width=4",
    "network.latent_dim=8",
    "recipe.batch=16",
    "recipe.streams=8",
    "schedule.overhead_share=1",
)
"""Overrides that make a run take seconds, and do everything when its interval says so."""


def write_dataset(
    folder: Path, images: int = 200, size: int = 32, channels: int = 3, encoding: Encoding = "packed", shard: int = 60
) -> Path:
    """Write a data set of smooth random pictures, every one different, and return its folder."""
    random = np.random.Generator(np.random.Philox(images))
    coarse = random.integers(0, 256, (images, 4, 4, channels), np.uint8)
    pixels = coarse.repeat(size // 4, 1).repeat(size // 4, 2)
    store, shards = Store(folder), []
    for start in range(0, images, shard):
        writer = ShardWriter(f"{start:06d}", encoding, [])
        for image in range(start, min(start + shard, images)):
            data = pixels[image] if encoding == "packed" else encode(pixels[image], encoding)
            writer.add(data, f"image{image:05d}", [])
        shards.append(write_shard(store, f"shard-{start:06d}.tar", writer))
    dataset = Dataset(
        image_size=size,
        channels=3 if channels == 3 else 1,
        encoding=encoding,
        source={"kind": "test"},
        images=images,
        bytes=sum(shard.bytes for shard in shards),
        shards=shards,
    )
    store.write(DATASET_FILE, dataset.model_dump_json().encode())
    return folder


Trainer = Callable[..., subprocess.CompletedProcess[str]]


def train_command(data: Path | str, out: Path, *overrides: str, options: Sequence[str] = ()) -> list[str]:
    """Return the command that trains a tiny network on one process."""
    script = str(ROOT / "pipeline" / "train.py")
    return [sys.executable, script, "--data", str(data), "--out", str(out), *options, *TINY, *overrides]


def kill_after_its_first_checkpoint(data: Path | str, out: Path, *overrides: str) -> int:
    """Start a run without an end, kill it once it has saved, and return the images of its newest checkpoint."""
    process = warm_start.Popen(
        train_command(data, out, *overrides, "schedule.total_images=1000000"),
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stderr=subprocess.PIPE,
    )
    try:
        for _ in range(4800):
            if list(out.glob("checkpoints/*/state.json")) or process.poll() is not None:
                break
            time.sleep(0.05)
    finally:
        process.kill()
        _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    return max(int(state.parent.name) for state in out.glob("checkpoints/*/state.json"))
