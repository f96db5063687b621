"""How fast `dcgan-data index` is, beside `tar -t`, which reads the same headers and knows nothing of images.

    python benchmarks/index.py [--tars 1000] [--images 1000] [--rounds 7]

Both read the same tars of small JPEGs, from the page cache, in turns. `tar -t` runs once for each tar, one after the
other, as a shell loop does, and again two at a time. The index is a command as a user types it: its start, its
worker processes, and its files are included. The tars are plain (`ustar`, images only), or as webdataset's own
writer makes them (attributes before every file, a .cls beside every image: four headers a sample). An A/A control
runs the loop of `tar -t` twice a round.
"""

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hardware import describe
from PIL import Image

DIFFERENT = 10
"""Tars that differ in their content."""
CODE = "import sys; from pipeline.data.cli import main; main()"


def pictures(count: int = 64) -> list[bytes]:
    """Return small JPEGs, some 800 bytes each."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        found.append(buffer.getvalue())
    return found


def make_tars(folder: Path, tars: int, images: int, *, labels: bool) -> None:
    """Write tars of `images` samples each; after DIFFERENT of them the same ones come again, as files of their own."""
    folder.mkdir()
    some = pictures()
    for number in range(tars):
        made = _make(folder, number % DIFFERENT, images, some, labels)
        if number >= DIFFERENT:
            shutil.copyfile(made, folder / f"{number:05d}.tar")


def _make(folder: Path, number: int, images: int, some: list[bytes], labels: bool) -> Path:
    """Return a tar, written unless it is there."""
    path = folder / f"{number:05d}.tar"
    if not path.exists():
        format = tarfile.PAX_FORMAT if labels else tarfile.USTAR_FORMAT
        with tarfile.open(path, "w", format=format) as tar:
            for row in range(images):
                key = f"{number * images + row:09d}"
                files = [("jpg", some[row % len(some)])]
                if labels:
                    files.insert(0, ("cls", str(row % 10).encode()))
                for suffix, data in files:
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    info.mtime = 1.5 if labels else 1
                    tar.addfile(info, io.BytesIO(data))
    return path


def list_with_tar(folder: Path, out: Path) -> None:
    """List every tar, one after the other."""
    loop = 'for file in "$0"/*.tar; do tar -tf "$file"; done > "$1"/list'
    subprocess.run(["sh", "-c", loop, str(folder), str(out)], check=True)


def list_two_at_a_time(folder: Path, out: Path) -> None:
    """List every tar, two at a time, each list in a file of its own."""
    loop = 'ls "$0" | xargs -P 2 -I{} sh -c \'tar -tf "$0/$2" > "$1/$2"\' "$0" "$1" {}'
    subprocess.run(["sh", "-c", loop, str(folder), str(out)], check=True)


def index(folder: Path, out: Path, *options: str) -> None:
    """Index the tars as a user does."""
    command = [sys.executable, "-c", CODE, "index", str(folder), str(out), *options]
    subprocess.run(command, check=True, capture_output=True)


def seconds(action: Callable[..., None], folder: Path, out: Path, *options: str) -> tuple[float, float]:
    """Return how long an action takes, with an empty folder for its results, and the processor time of its process."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    used, began = os.times(), time.perf_counter()
    action(folder, out, *options)
    took, now = time.perf_counter() - began, os.times()
    return took, now.children_user + now.children_system - used.children_user - used.children_system


def compare(folder: Path, out: Path, rounds: int) -> dict[str, object]:
    """Return medians in interleaved rounds: seconds, and `tar -t`'s seconds over each other's."""
    actions: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
        "index, 2 workers": (index, ("--workers", "2")),
        "index, 1 worker": (index, ("--workers", "1")),
        "tar -t, two at a time": (list_two_at_a_time, ()),
        "A/A control": (list_with_tar, ()),
    }
    base: list[float] = []
    processor: dict[str, list[float]] = {"tar -t": [], "index, 1 worker": []}
    took: dict[str, list[float]] = {name: [] for name in actions}
    seconds(list_with_tar, folder, out)  # into the page cache
    for number in range(rounds):
        tar, tar_processor = seconds(list_with_tar, folder, out)
        base.append(tar)
        processor["tar -t"].append(tar_processor)
        for name, (action, options) in actions.items():
            wall, used = seconds(action, folder, out, *options)
            took[name].append(wall)
            if name in processor:  # with two workers, those are no children of this process
                processor[name].append(used)
        print(number, round(base[-1], 2), {name: round(values[-1], 2) for name, values in took.items()}, flush=True)
    ratios = {name: [b / value for b, value in zip(base, values, strict=True)] for name, values in took.items()}
    return {
        "processor_seconds": {name: round(statistics.median(values), 2) for name, values in processor.items()},
        "tar_seconds": round(statistics.median(base), 2),
        "seconds": {name: round(statistics.median(values), 2) for name, values in took.items()},
        "speed_of_tar": {name: round(statistics.median(values), 2) for name, values in ratios.items()},
        "spread": {name: [round(min(values), 2), round(max(values), 2)] for name, values in ratios.items()},
    }


def main() -> None:
    """Measure in interleaved rounds and write the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tars", type=int, default=1000)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    result = {
        **describe(),
        "tar": subprocess.run(["tar", "--version"], check=True, capture_output=True, text=True).stdout.split("\n")[0],
    }
    result |= {"tars": arguments.tars, "images_a_tar": arguments.images, "rounds": arguments.rounds}
    result["load_average_before"] = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name, labels in (("images", False), ("images and labels", True)):
            make_tars(root / name, arguments.tars, arguments.images, labels=labels)
            result[name] = compare(root / name, root / "out", arguments.rounds)
            shutil.rmtree(root / name)
    result["load_average_after"] = round(os.getloadavg()[0], 1)
    Path(__file__).with_name("results").joinpath("index.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
