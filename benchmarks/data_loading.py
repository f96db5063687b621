"""How fast training batches can be had from disk, against webdataset, a numpy memmap, and other projects.

    python benchmarks/data_loading.py [--others PYTHON]
    python benchmarks/data_loading.py --remote [--quick]   # instead: from a slow store, see loading/slow_store.py

PYTHON is the interpreter of an environment that has mosaicml-streaming and litdata. Every contender runs in a
process of its own on the same core, and they take turns: 15 rounds, medians of the per-round ratios. "again" is
the same contender a second time, the A/A control. JPEGs are what Pillow writes at quality 95 (color at half
resolution, 2.8 kB); "4:4:4" are those of `dcgan-data build --encoding jpg`, which keeps color at full resolution.
"First epoch" counts from nothing: opening, reading and, for ours alone, the SHA-256 of every shard.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hardware import cpu_model, describe
from loading.contenders import BATCH, CONTENDERS, OTHERS, SIZE
from PIL import Image

ROUNDS = 15
ROUND_SECONDS = 0.5
Seconds = dict[str, list[float]]
RESULTS = Path(__file__).parent / "results"
BARS = [("ours jpg", "webdataset pil + normalize", 9.0), ("ours packed", "memmap gather", 0.6)]
CONTROLS = [("ours jpg, again", "ours jpg"), ("ours packed, again", "ours packed")]


def main() -> None:
    """Make the data, let all contenders take turns, write benchmarks/results/data_loading.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, default=Path("data/faces"), help="a data set of ours to draw from")
    parser.add_argument("--count", type=int, default=20_480, help="images in the benchmark's data set")
    parser.add_argument("--work", type=Path, default=Path("/tmp/dcgan-benchmark-data-loading"))
    parser.add_argument("--others", help="python of an environment with mosaicml-streaming and litdata")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    remote = parser.add_argument_group("from a slow store")
    remote.add_argument("--remote", action="store_true", help="measure that, and nothing else")
    remote.add_argument("--quick", action="store_true", help="in a minute, without a result file")
    remote.add_argument("--lookahead-mb", type=int, default=1_024, help="runtime.lookahead_mb")
    remote.add_argument("--lanes", type=int, default=4, help="requests that the store of a rank answers at once")
    remote.add_argument("--note", default="", help="what else ran on the machine, for the record")
    options = parser.parse_args()
    if options.remote:
        from loading import slow_store

        settings = {name: getattr(options, name) for name in ("quick", "lookahead_mb", "lanes", "note")}
        slow_store.main(RESULTS, **settings)
        return
    core = min(os.sched_getaffinity(0))
    prepare(options.work, options.images, options.count)
    os.sched_setaffinity(0, {core})  # the contenders inherit it
    seconds, processor, first_epoch = race(options.work, options.others, options.rounds)
    write_report(seconds, processor, first_epoch, options.count)


def prepare(work: Path, source: Path, count: int) -> None:
    """Write `count` distinct 64x64 images as packed and two jpg data sets, and as one .npy."""
    from pipeline.common.imaging import encode
    from pipeline.common.storage import Store
    from pipeline.data.build.options import BuildOptions
    from pipeline.data.dataset import DATASET_FILE, Dataset, Encoding, Shard, dump_dataset, open_dataset
    from pipeline.data.shard_reader import iterate
    from pipeline.data.shard_writer import ShardWriter, write_shard

    if (work / "images.npy").exists():
        return
    base = np.concatenate(list(iterate(open_dataset(source))))
    assert base.shape[1:] == (SIZE, SIZE, 3), base.shape
    rng = np.random.default_rng(0)
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for index in range(count):  # shifted and brightened copies: as costly to decode as their originals
        moved = np.roll(base[index % len(base)], rng.integers(-6, 7, 2), (0, 1)).astype(np.float32)
        images[index] = np.clip(moved * rng.uniform(0.8, 1.2), 0, 255)
    forms: dict[str, tuple[Encoding, Callable[[Any], Any]]] = {
        "packed": ("packed", lambda image: image),
        "jpg": ("jpg", pillow_jpeg),
        "jpg444": ("jpg", lambda image: encode(image, "jpg", 95)),
    }
    for name, (encoding, form) in forms.items():
        store = Store(work / name)
        shards: list[Shard] = []
        writer = ShardWriter("000000", encoding, [], BuildOptions.shard_bytes)
        for index, image in enumerate(images):
            data = form(image)
            if not writer.add(data, str(index), []):  # full
                shards.append(write_shard(store, f"{len(shards):06d}.tar", writer))
                writer = ShardWriter(f"{len(shards):06d}", encoding, [], BuildOptions.shard_bytes)
                writer.add(data, str(index), [])
        shards.append(write_shard(store, f"{len(shards):06d}.tar", writer))
        dataset = Dataset(
            image_size=SIZE,
            channels=3,
            encoding=encoding,
            source={"kind": "benchmark"},
            images=count,
            bytes=sum(shard.bytes for shard in shards),
            shards=shards,
        )
        store.write(DATASET_FILE, dump_dataset(dataset))
    np.save(work / "partial.npy", images)
    (work / "partial.npy").rename(work / "images.npy")


def pillow_jpeg(image: Any) -> bytes:
    """Encode as nearly everybody does."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


class Contender:
    """A process that draws batches when it is told to."""

    def __init__(self, name: str, python: str, work: Path) -> None:
        command = [python, str(Path(__file__).parent / "loading" / "contenders.py"), name, str(work)]
        with (work / "contenders.log").open("a") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1
            )
        self.name = name
        answer = self.process.stdout.readline()  # type: ignore[union-attr]
        if not answer:
            raise SystemExit(f"{name} did not start: see {work}/contenders.log")
        start = json.loads(answer)
        self.first_batch_seconds = start["first_batch_seconds"]
        self.first_epoch = start["first_epoch_images_per_second"]
        self.batches = 4
        while (took := self.draw()[0]) < ROUND_SECONDS / 2 or self.batches == 4:
            self.batches = max(self.batches + 1, int(self.batches * min(8, ROUND_SECONDS / took)))

    def draw(self) -> tuple[float, float]:
        """Return the seconds that `batches` batches took, and the processor seconds of all threads."""
        print(self.batches, file=self.process.stdin)
        clock, processor = map(float, self.process.stdout.readline().split())  # type: ignore[union-attr]
        return clock, processor


def race(
    work: Path, others: str | None, rounds: int, names: Sequence[str] = tuple(CONTENDERS)
) -> tuple[Seconds, Seconds, dict[str, float]]:
    """Return the seconds and the processor seconds an image took of every contender, in each round.

    And, of the one time that each started, the images/s of its first epoch.
    """
    contenders = []
    for name in names:
        foreign = name.startswith(OTHERS)
        if foreign and not others:
            continue
        contenders.append(Contender(name, others if foreign and others else sys.executable, work))
        print(f"{name}: first batch after {contenders[-1].first_batch_seconds:.2f} s", flush=True)
    seconds: Seconds = {contender.name: [] for contender in contenders}
    processor: Seconds = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        for contender in contenders[:: 1 if number % 2 else -1]:
            took = contender.draw()
            seconds[contender.name].append(took[0] / contender.batches / BATCH)
            processor[contender.name].append(took[1] / contender.batches / BATCH)
        print(f"round {number + 1} of {rounds}", flush=True)
    for contender in contenders:
        contender.process.stdin.close()  # type: ignore[union-attr]
        contender.process.wait(30)
    return seconds, processor, {contender.name: contender.first_epoch for contender in contenders}


def write_report(seconds: Seconds, processor: Seconds, first_epoch: dict[str, float], count: int) -> None:
    """Write the results, and say which bars hold."""

    def ratio(name: str, reference: str, of: Seconds = seconds) -> float:
        return statistics.median(b / a for a, b in zip(of[name], of[reference], strict=True))

    bars = [
        {
            "what": f"{a} / {b}",
            "bar": bar,
            "ratio": round(ratio(a, b), 2),
            "ratio_of_processor_time": round(ratio(a, b, processor), 2),
            "holds": ratio(a, b) >= bar,
        }
        for a, b, bar in BARS
    ]
    result = {
        **describe("webdataset", "simplejpeg"),
        "cores_used": 1,
        "load_average": os.getloadavg()[1],
        "data": {"images": count, "size": SIZE, "jpg_quality": 95, "batch": BATCH},
        "rounds": len(next(iter(seconds.values()))),
        "bars": bars,
        "controls": {f"{a} / {b}": round(ratio(a, b), 3) for a, b in CONTROLS},
        "images_per_second": {name: round(1 / statistics.median(values)) for name, values in seconds.items()},
        "first_epoch_images_per_second": {name: round(rate) for name, rate in first_epoch.items()},
        "times_webdataset_pil": {name: round(ratio(name, BARS[0][1]), 2) for name in seconds},
        "seconds_per_image": seconds,
        "processor_seconds_per_image": processor,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "data_loading.json").write_text(json.dumps(result, indent=1) + "\n")
    rates = result["images_per_second"]
    rows = [
        f"| {name} | {rates[name]:,} | {ratio(name, BARS[0][1]):.1f} | {round(first_epoch[name]):,} |"
        for name in seconds
    ]
    lines = [
        f"One core of {cpu_model()}, {count:,} images of 64×64, batches of {BATCH}, shuffled, {result['date']}.",
        "",
        "| | images/s | × webdataset pil + normalize | first epoch, images/s |",
        "|---|---:|---:|---:|",
        *rows,
        "",
        *(
            f"- {bar['what']}: {bar['ratio']}, of processor time {bar['ratio_of_processor_time']} "
            f"(bar {bar['bar']}: {'holds' if bar['holds'] else 'MISSED'})"
            for bar in bars
        ),
        f"- load average of the machine meanwhile: {os.getloadavg()[1]:.1f}",
        *(f"- control {name}: {value}" for name, value in result["controls"].items()),
    ]
    (RESULTS / "data_loading.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
