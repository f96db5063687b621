"""A run directory as the trainer leaves it, made from pictures instead of training."""

import json
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.common.imaging import grid, save_png
from pipeline.config import RunConfig


def make_run(run: Path, pictures: NDArray[np.uint8]) -> None:
    """Write config.json, metrics.jsonl, timing.jsonl and grids that get sharper."""
    run.mkdir(parents=True, exist_ok=True)
    dataset = {"location": "data/faces", "fingerprint": "0" * 64, "images": 5000, "encoding": "webp", "source": {}}
    (run / "config.json").write_text(json.dumps({"config": RunConfig().model_dump(), "dataset": dataset}))
    draw = np.random.default_rng(0)
    with (run / "metrics.jsonl").open("w") as metrics, (run / "timing.jsonl").open("w") as timing:
        for images in range(6_400, 64_001, 640):
            values = {
                "images": images,
                "loss_d": 0.9 + 0.4 * math.exp(-images / 9000) + draw.normal(0, 0.05),
                "loss_g": 2.2 + draw.normal(0, 0.2),
                "d_real": 0.7,
                "d_fake": 0.3 + draw.normal(0, 0.02),
                "grad_norm_d": 1.5 + draw.normal(0, 0.1),
                "grad_norm_g": 3.0,
                "diversity": 1 - math.exp(-images / 9000),
            }
            metrics.write(json.dumps(values) + "\n")
            timing.write(json.dumps({"images": images, "images_per_second": 150 + draw.normal(0, 5)}) + "\n")
            if images % 12_800 == 0:
                swd = 20 + 2e5 / images
                levels = {"swd": swd, "swd_64": swd * 1.2, "swd_32": swd, "swd_16": swd * 0.8}
                line = {"images": images, **levels, "ms_ssim": 0.3, "ms_ssim_real": 0.21}
                metrics.write(json.dumps(line) + "\n")
    (run / "samples").mkdir(exist_ok=True)
    for step, images in enumerate(range(0, 64_001, 6_400)):
        noise = draw.normal(0, 12 * (10 - step), pictures[:64].shape)
        save_png(run / "samples" / f"{images:09d}.png", grid((pictures[:64] + noise).clip(0, 255).astype(np.uint8), 8))
