"""How fast batches of 64x64 come from the tars of others: 256-pixel JPEGs, decoded and resized as they are read.

    python benchmarks/indexed_loading.py

Against stock webdataset with `decode("pil")` and a resize, and against webdataset with simplejpeg's scaled decoding,
which decodes at half the size as we do; both resize as we do (Lanczos), and "bicubic" as Pillow does by default. On
one core all decode in the process; on two, webdataset has two worker processes (WebLoader), ours two threads.
Every contender runs in a process of its own on the same cores, and they take turns.
"""

import argparse
import io
import json
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from data_loading import RESULTS, Seconds, race
from hardware import cpu_model, describe
from loading.contenders import BATCH, INDEXED, SIZE
from PIL import Image

ROUNDS = 15
SOURCE_SIDE, SHARD_IMAGES = 256, 512
OURS = "ours, indexed tars"
BARS = [("webdataset pil + resize", 2.0), ("webdataset simplejpeg scaled + resize", 1.2)]


def main() -> None:
    """Make the tars, let all contenders take turns on one core and on two, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, default=Path("data/faces"), help="a data set of ours to draw from")
    parser.add_argument("--count", type=int, default=8_192, help="images in the tars")
    parser.add_argument("--work", type=Path, default=Path("/tmp/dcgan-benchmark-indexed-loading"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--note", default="", help="what else ran on the machine, for the record")
    options = parser.parse_args()
    jpeg_bytes = prepare(options.work, options.images, options.count)
    available = sorted(os.sched_getaffinity(0))
    seconds, processor = {}, {}
    for cores in (1, 2):
        os.sched_setaffinity(0, set(available[:cores]))  # the contenders inherit it
        seconds[cores], processor[cores], _ = race(options.work, None, options.rounds, list(INDEXED))
        os.sched_setaffinity(0, set(available))
    write_report(seconds, processor, options.count, jpeg_bytes, options.note)


def prepare(work: Path, source: Path, count: int) -> float:
    """Write `count` JPEGs into tars as others make them, and index those; return the mean bytes of a JPEG."""
    import tarfile

    from pipeline.data.dataset import open_dataset
    from pipeline.data.index.indexer import make_index
    from pipeline.data.shard_reader import iterate

    tars = work / "tars"
    if not (work / "images.npy").exists():
        tars.mkdir(parents=True, exist_ok=True)
        base = np.concatenate(list(iterate(open_dataset(source))))
        rng = np.random.default_rng(0)
        for first in range(0, count, SHARD_IMAGES):
            with tarfile.open(tars / f"train-{first // SHARD_IMAGES:06d}.tar", "w") as tar:
                for index in range(first, min(first + SHARD_IMAGES, count)):
                    data = photograph(base[index % len(base)], rng)
                    entry = tarfile.TarInfo(f"{index:08d}.jpg")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        np.save(work / "images.npy", np.zeros((count, 1), np.uint8))  # tells the contenders how many there are
    names = sorted(str(path) for path in tars.glob("*.tar"))
    make_index(names, str(work / "indexed"), size=SIZE, channels=3)
    return sum(path.stat().st_size for path in tars.glob("*.tar")) / count


def photograph(image: Any, rng: np.random.Generator) -> bytes:
    """Enlarge an image to SOURCE_SIDE, with grain, as a JPEG of about 20 kB: what a photograph of that size takes."""
    large = np.asarray(Image.fromarray(image).resize((SOURCE_SIDE, SOURCE_SIDE), Image.Resampling.BICUBIC))
    grain = rng.normal(0, 5, (SOURCE_SIDE, SOURCE_SIDE, 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(large + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_report(
    seconds: dict[int, Seconds], processor: dict[int, Seconds], count: int, jpeg_bytes: float, note: str
) -> None:
    """Write the results, and say which bars hold."""
    lines = [
        f"{cpu_model()}, {count:,} JPEGs of {SOURCE_SIDE}×{SOURCE_SIDE} ({jpeg_bytes / 1e3:.0f} kB) to {SIZE}×{SIZE}, "
        f"batches of {BATCH}, {describe()['date']}.",
        "",
        "| | one core, images/s | ours is × | two cores, images/s | ours is × |",
        "|---|---:|---:|---:|---:|",
    ]

    def ratio(of: Seconds, name: str) -> float:
        return statistics.median(b / a for a, b in zip(of[OURS], of[name], strict=True))

    for name in INDEXED:
        cells = [
            f"{1 / statistics.median(seconds[cores][name]):,.0f} | {ratio(seconds[cores], name):.2f}"
            for cores in seconds
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    bars = [
        {
            "what": f"{OURS} / {name}",
            "cores": cores,
            "bar": bar,
            "ratio": round(ratio(seconds[cores], name), 3),
            # On two cores that of webdataset's workers is not counted.
            "ratio_of_processor_time": round(ratio(processor[cores], name), 3) if cores == 1 else None,
        }
        for name, bar in BARS
        for cores in seconds
    ]
    lines += ["", *map(_line, bars)]
    lines += [f"- load average of the machine meanwhile: {os.getloadavg()[1]:.1f}; {note or 'nothing else ran'}"]
    result = {
        **describe("webdataset", "simplejpeg", "pillow"),
        "note": note,
        "bars": bars,
        "seconds_per_image": seconds,
    }
    (RESULTS / "indexed_loading.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "indexed_loading.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _line(bar: dict[str, Any]) -> str:
    processor = bar["ratio_of_processor_time"]
    more = f", of processor time {processor}" if processor else ""
    holds = "holds" if bar["ratio"] >= bar["bar"] else "MISSED"
    return f"- {bar['what']}, {bar['cores']} cores: {bar['ratio']}{more} (bar {bar['bar']}: {holds})"


if __name__ == "__main__":
    main()
