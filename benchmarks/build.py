"""How fast `dcgan-data build folder` is, beside a plain Pillow loop that writes the same images with webdataset.

    python benchmarks/build.py [--images 3000] [--rounds 15]
    python benchmarks/build.py --forms [--rounds 7]   # instead: a zip and a parquet, beside their folder
    python benchmarks/build.py --parts [--rounds 5]   # instead: two parts beside the whole

Both read the same folder of JPEGs (256 pixels on the short side, as LSUN's are), crop and resize to 64×64 with
antialiasing, and write tars of JPEGs (quality 95) with a .json beside each. The loop is one process, as such
loops are; an A/A control runs it twice a round. Also measures peak memory over builds of growing size.

With --forms, builds of the same JPEGs take turns: from their folder, from a zip of it (deflated, as downloads are) and
from a parquet as the Hub has it, with two workers each. With --parts, builds of a folder of four times as many names:
as a whole with one worker, and as two parts side by side with one worker each, without and with the merge.
"""

import argparse
import io
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import webdataset
from hardware import describe
from PIL import Image, ImageOps

CODE = "import sys; from pipeline.data.cli import main; main()"


def make_folder(path: Path, images: int) -> None:
    """Write photograph-like JPEGs of LSUN's size."""
    rng = np.random.default_rng(0)
    path.mkdir()
    for index in range(images):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        picture = np.asarray(small.resize((341, 256), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(path / f"{index:06d}.jpg", quality=85)


def open_to_write(name: str) -> BinaryIO:
    """Open a shard; with webdataset's own opener the loop could not write local files under WDS_SECURE."""
    return Path(name).open("wb")


def pillow_loop(src: Path, out: Path) -> None:
    """Do what people write first."""
    out.mkdir()
    with webdataset.ShardWriter(f"{out}/%06d.tar", maxsize=32e6, verbose=0, opener=open_to_write) as sink:
        for index, path in enumerate(sorted(src.iterdir())):
            image = ImageOps.fit(Image.open(path).convert("RGB"), (64, 64), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=95, subsampling=0)
            sink.write({"__key__": f"{index:06d}", "jpg": buffer.getvalue(), "json": {"key": path.name}})


def ours(src: Path, out: Path, *options: str) -> None:
    """Run the command as a user does, its start included."""
    command = [sys.executable, "-c", CODE, "build", "folder", str(src), str(out), "--encoding", "jpg", *options]
    subprocess.run(command, check=True, capture_output=True)


def seconds(action: Callable[..., None], src: Path, out: Path, *options: str) -> float:
    """Return how long an action takes on an empty output folder."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    action(src, out, *options)
    return time.perf_counter() - began


def peak_memory(src: Path, out: Path) -> dict[str, int]:
    """Return the largest resident sizes of a build's processes, in bytes."""
    import psutil

    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", CODE, "build", "folder", str(src), str(out), "--encoding", "packed"]
    peaks: dict[int, int] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        parent = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                for child in [parent, *parent.children(recursive=True)]:
                    peaks[child.pid] = max(peaks.get(child.pid, 0), child.memory_info().rss)
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"the build failed with {process.returncode}")
    parent_peak = peaks.pop(process.pid)
    return {"parent": parent_peak, "largest_worker": max(peaks.values(), default=0)}


def memory(root: Path, counts: list[int]) -> list[dict[str, int]]:
    """Measure memory over folders of growing size: links to the same few pictures, each of which is decoded anew."""
    pictures = sorted((root / "src").iterdir())
    rows = []
    for count in counts:
        src = root / f"many-{count}"
        for index in range(count):
            folder = src / f"{index // 1000:04d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index:06d}.jpg").hardlink_to(pictures[index % len(pictures)])
        began = time.perf_counter()
        row = {"images": count, **peak_memory(src, root / "out"), "seconds": 0}
        row["seconds"] = round(time.perf_counter() - began)
        rows.append(row)
        print(json.dumps(row), flush=True)
        shutil.rmtree(src)
    return rows


def make_forms(root: Path) -> None:
    """Write the folder `src` as a zip and as a parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = sorted((root / "src").iterdir())
    with zipfile.ZipFile(root / "src.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in pictures:
            archive.write(path, path.name)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": path.read_bytes(), "path": path.name} for path in pictures], image)
    pq.write_table(pa.table({"image": column}), root / "src.parquet", row_group_size=256)


def make_many(root: Path) -> None:
    """Write the folder `many`: four links to each picture of `src`."""
    pictures = sorted((root / "src").iterdir())
    for copy in range(4):
        folder = root / "many" / f"{copy}"
        folder.mkdir(parents=True)
        for path in pictures:
            (folder / path.name).hardlink_to(path)


def run_side_by_side(root: Path, *commands: list[str]) -> float:
    """Return how long commands of dcgan-data take that start together, on empty folders."""
    for path in root.glob("out*"):
        shutil.rmtree(path)
    began = time.perf_counter()
    running = []
    for words in commands:
        command = [sys.executable, "-c", CODE, *words]
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"a build failed; run it by hand: dcgan-data {' '.join(commands[0])}")
    return time.perf_counter() - began


def measure_forms(root: Path, rounds: int, *, of_parts: bool) -> None:
    """Measure zip and parquet, or parts, in interleaved rounds, and write the record."""
    (make_many if of_parts else make_forms)(root)
    options = ["--encoding", "jpg", "--workers"]
    out = str(root / "out")

    def build(kind: str, name: str, *more: str) -> list[str]:
        return ["build", kind, str(root / name), out, *options, *more]

    def parts(merge: bool) -> float:
        halves = (
            ["build", "folder", str(root / "many"), f"{out}{i}", *options, "1", "--part", f"{i}/2"] for i in (0, 1)
        )
        took = run_side_by_side(root, *halves)
        if not merge:
            return took
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", CODE, "merge", out, f"{out}0", f"{out}1"], check=True, capture_output=True
        )
        return took + time.perf_counter() - began

    whole_and_parts: dict[str, Callable[[], float]] = {
        "whole": lambda: run_side_by_side(root, build("folder", "many", "1")),
        "two parts": lambda: parts(merge=False),
        "two parts, merged": lambda: parts(merge=True),
    }
    forms: dict[str, Callable[[], float]] = {
        "folder": lambda: run_side_by_side(root, build("folder", "src", "2")),
        "folder, again": lambda: run_side_by_side(root, build("folder", "src", "2")),
        "zip": lambda: run_side_by_side(root, build("folder", "src.zip", "2")),
        "parquet": lambda: run_side_by_side(root, build("parquet", "src.parquet", "2")),
    }
    actions, first = (whole_and_parts, "whole") if of_parts else (forms, "folder")
    took: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds):
        for name in list(actions)[:: 1 if number % 2 else -1]:
            took[name].append(actions[name]())
        print(number, {name: round(values[-1], 2) for name, values in took.items()}, flush=True)
    speeds = {
        name: [base / value for base, value in zip(took[first], values, strict=True)]
        for name, values in took.items()
        if name != first
    }
    result = {
        **describe("pillow", "pyarrow", "simplejpeg"),
        "images": len(list((root / "src").iterdir())),
        "rounds": rounds,
        "seconds": {name: round(statistics.median(values), 2) for name, values in took.items()},
        "times_as_fast": {name: round(statistics.median(values), 2) for name, values in speeds.items()},
        "beside": first,
        "spread": {name: [round(min(values), 2), round(max(values), 2)] for name, values in speeds.items()},
        "bars": {"two parts": 1.8} if of_parts else {"zip": 0.9, "parquet": 0.9},
    }
    name = "build_parts.json" if of_parts else "build_forms.json"
    Path(__file__).with_name("results").joinpath(name).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["times_as_fast"]))


def main() -> None:
    """Measure in interleaved rounds and write the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--forms", action="store_true", help="measure these, and nothing else")
    parser.add_argument("--parts", action="store_true", help="measure these, and nothing else")
    parser.add_argument("--memory", type=int, nargs="*", default=[5_000, 100_000])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        make_folder(root / "src", arguments.images)
        if arguments.forms or arguments.parts:
            measure_forms(root, arguments.rounds, of_parts=arguments.parts)
            return
        ratios: dict[str, list[float]] = {"2 workers": [], "1 worker": [], "A/A control": []}
        base = []
        for number in range(arguments.rounds):
            loop = seconds(pillow_loop, root / "src", root / "out")
            base.append(loop)
            ratios["2 workers"].append(loop / seconds(ours, root / "src", root / "out", "--workers", "2"))
            ratios["1 worker"].append(loop / seconds(ours, root / "src", root / "out", "--workers", "1"))
            ratios["A/A control"].append(loop / seconds(pillow_loop, root / "src", root / "out"))
            print(number, {name: round(values[-1], 2) for name, values in ratios.items()}, flush=True)
        result = {
            **describe("pillow", "webdataset", "simplejpeg"),
            "images": arguments.images,
            "rounds": arguments.rounds,
            "loop_images_a_second": round(arguments.images / statistics.median(base)),
            "times_the_loop": {name: round(statistics.median(values), 2) for name, values in ratios.items()},
            "spread": {name: [round(min(values), 2), round(max(values), 2)] for name, values in ratios.items()},
            "peak_memory_bytes": memory(root, arguments.memory),
        }
    Path(__file__).with_name("results").joinpath("build.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["times_the_loop"]))


if __name__ == "__main__":
    main()
