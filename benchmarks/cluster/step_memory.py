"""How much memory do the steps of the Kubernetes Jobs take?

    python benchmarks/cluster/step_memory.py [--rounds 3]    # CPU, minutes a round

Runs each step's program as its container does, on two cores, and adds up the proportional set sizes (PSS) of its
processes every 20 ms: what a container's limit counts, without the page cache, which gives way. The network is the
PyTorch tutorial's, width 64 at 64x64; larger ones in the table of `pipeline/train.py --show-config`.

Writes benchmarks/results/step_memory.json, which docs/operations.md shows beside the manifests' limits.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from hardware import describe  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "step_memory.json"
MIB = 1 << 20
BUILD = "dcgan-data build folder {0} {1} --size 64 --encoding packed --workers 2"
TRAIN = "--data=data --out=run --preset=tutorial64 schedule.total_images=1280 schedule.evaluate_every_images=1280"
GENERATE = "--model=model/model.onnx --count=8192 --shard-images=2048 --format=webp --out=samples"


def pss(process: psutil.Process) -> int:
    """Return the proportional set size of a process and all below it, in bytes."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            text = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
        except (OSError, psutil.Error):  # it has ended meanwhile
            continue
        total += next((int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:")), 0)
    return total


def peak(command: str, work: Path) -> int:
    """Run a program and return the largest sum of its processes' memory, in bytes."""
    program, *words = command.split()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    with (work / "log").open("wb") as log:
        installed = Path(sys.executable).with_name(program)
        process = psutil.Popen([installed, *words], cwd=work, stdout=log, stderr=log, env=environment)
        largest = 0
        while process.poll() is None:
            largest = max(largest, pss(process))
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command}: exit code {process.returncode}\n{(work / 'log').read_text()[-2000:]}")
    return largest


def make_pictures(work: Path) -> None:
    """Write small pictures, photographs of 24 megapixels, and four as large as any that is read."""
    rng = np.random.default_rng(0)
    for name, count, width, height, suffix in (
        ("small", 4096, 96, 96, "jpg"),
        ("photographs", 24, 6000, 4000, "jpg"),
        ("largest", 4, 1 << 14, 1 << 13, "png"),
    ):
        (work / name).mkdir()
        for index in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
            picture.save(work / name / f"{index:04d}.{suffix}", quality=90, compress_level=1)


STEPS = {
    "data, pictures of 96 pixels": ("k8s/data/build.yaml", "data", BUILD.format("small", "data")),
    "data, JPEGs of 24 megapixels": (
        "k8s/data/build.yaml",
        "data",
        f"{BUILD.format('photographs', 'out-photographs')} --shard-images 8",
    ),
    "data, PNGs of 134 megapixels": (
        "k8s/data/build.yaml",
        "data",
        f"{BUILD.format('largest', 'out-largest')} --shard-images 2",
    ),
    "data-merge": ("k8s/data/merge.yaml", "merge", "dcgan-data merge parts"),
    "train": ("k8s/train/job.yaml", "train", f"dcgan-launch train {TRAIN}"),
    "export: onnx": ("k8s/export/job.yaml", "onnx", "dcgan-export onnx --ckpt=run --out=model"),
    "export: publish": (
        "k8s/export/job.yaml",
        "publish",
        "dcgan-export publish --model=model/model.onnx --to=published",
    ),
    "export: triton": (
        "k8s/export/job.yaml",
        "triton",
        "dcgan-export triton --model=model/model.onnx --out=repository --threads=2",
    ),
    "generate": ("k8s/generate/job.yaml", "generate", f"dcgan-generate {GENERATE} --part=0/2"),
    "generate-merge": ("k8s/generate/merge.yaml", "merge", "dcgan-generate merge samples"),
}
"""The manifest, the container and the command of each step."""
BEFORE = {
    "data-merge": [f"{BUILD.format('small', 'parts')} --part {part}/2" for part in (0, 1)],
    "generate-merge": [STEPS["generate"][2].replace("0/2", "1/2")],
}
"""What a step finds done, beside the steps before it."""


def main() -> None:
    """Run the steps in turn, and write the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    found: dict[str, int] = {}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            make_pictures(work)
            for name, (_, _, command) in STEPS.items():
                for first in BEFORE.get(name, []):
                    peak(first, work)
                found[name] = max(found.get(name, 0), peak(command, work))
                print(f"{name}: {found[name] // MIB:,} MiB", flush=True)
    rows = {
        name: {"manifest": manifest, "container": container, "peak_mib": round(found[name] / MIB)}
        for name, (manifest, container, _) in STEPS.items()
    }
    RESULT.write_text(json.dumps({**describe("pillow", "onnx", "onnxruntime"), "steps": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
