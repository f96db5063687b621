"""How much of what a slow store gives reaches a rank of 1, of 8 and of 16: 50 ms a shard of 200 images.

    python benchmarks/data_loading.py --remote [--quick] [--lookahead-mb N] [--lanes N]

One rank of each run is measured, in a process of its own, for want of cores for 16. Its store answers a request after
50 ms, and LANES at a time: at most LANES * 200 / 0.05 images/s. What it gives is measured, too: by more threads, which
fetch the same shards into files and do nothing else. Store and loader take turns; medians of the per-round ratios.
"One ahead" is the loader with runtime.lookahead_mb=0. All files are in memory (/dev/shm).

Images have 8x8 pixels instead of 64x64, and the lookahead is 1/64 of N, so that it holds as many shards: the question
here is how long the store takes, not how fast a core checks and copies bytes. A rank draws batches of 128 as fast as
they come, and no shard twice. The lookahead is that of a machine with all the ranks.
"""

import hashlib
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hardware import describe

from pipeline.common.storage import Store
from pipeline.data.dataset import Dataset
from pipeline.data.loading.loader import Loader
from pipeline.data.shard_writer import ShardWriter

LATENCY_SECONDS, SHARD_IMAGES, SIDE, BATCH, STREAMS, SEED = 0.05, 200, 8, 128, 16, 0
RANKS = (1, 8, 16)
BAR = 0.9
WARM_UP_SECONDS = 1.0
STAMP_BYTES = 8
"""Of a shard's first image: its number, so that no two shards are the same."""


class SlowStore(Store):
    """Answers a request for a shard after LATENCY_SECONDS, `lanes` requests at a time."""

    def __init__(self, lanes: int) -> None:
        super().__init__("memory://slow")
        writer = ShardWriter("000000", "packed", [])
        images = np.random.default_rng(0).integers(0, 256, (SHARD_IMAGES, SIDE, SIDE, 3), np.uint8)
        writer.add_all(images, [str(index) for index in range(SHARD_IMAGES)])
        data, self.entry = writer.finish("000000.tar")
        self._content = b"".join(data)
        self._lanes = threading.Semaphore(lanes)

    def fetch(self, name: str, path: Path) -> None:
        """Write a shard to `path`."""
        with self._lanes:
            time.sleep(LATENCY_SECONDS)
        path.write_bytes(self.shard(int(name.partition(".")[0])))

    def shard(self, number: int) -> bytes:
        """Return the file of a shard."""
        begin = self.entry.offsets[0]
        return self._content[:begin] + number.to_bytes(STAMP_BYTES, "little") + self._content[begin + STAMP_BYTES :]


def make_dataset(store: SlowStore, shards: int) -> Dataset:
    """Return a data set of so many shards in the store."""
    entries = []
    for number in range(shards):
        digest = hashlib.sha256(store.shard(number)).hexdigest()
        entries.append(store.entry.model_copy(update={"name": f"{number:06d}.tar", "sha256": digest}))
    return Dataset(
        image_size=SIDE,
        channels=3,
        encoding="packed",
        source={"kind": "benchmark"},
        images=shards * SHARD_IMAGES,
        bytes=sum(entry.bytes for entry in entries),
        shards=entries,
    ).at(store)


def measure_store(dataset: Dataset, lanes: int, seconds: float) -> float:
    """Return the images/s of threads that fetch shards and do nothing else; there are more of them than lanes."""
    counts, closed = [0] * (4 * lanes), threading.Event()

    def fetch(thread: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            while not closed.is_set():
                shard = dataset.shards[(thread + len(counts) * counts[thread]) % len(dataset.shards)]
                dataset.store.fetch(shard.name, Path(folder) / "shard")
                counts[thread] += 1

    threads = [threading.Thread(target=fetch, args=(thread,)) for thread in range(len(counts))]
    for thread in threads:
        thread.start()
    time.sleep(WARM_UP_SECONDS)
    start, before = time.perf_counter(), sum(counts)
    time.sleep(seconds)
    rate = (sum(counts) - before) * SHARD_IMAGES / (time.perf_counter() - start)
    closed.set()
    for thread in threads:
        thread.join()
    return rate


def measure_loader(dataset: Dataset, world_size: int, lookahead_bytes: int, seconds: float) -> float:
    """Return the images/s of a loader whose batches are drawn as fast as they come."""
    with (
        tempfile.TemporaryDirectory() as cache,
        Loader(
            dataset,
            seed=SEED,
            streams=STREAMS,
            batch=BATCH * world_size,
            rank=0,
            world_size=world_size,
            cache_dir=Path(cache),
            resident_limit=0,
            lookahead_bytes=lookahead_bytes,
            end=dataset.images // (BATCH * world_size) * BATCH * world_size,
        ) as loader,
    ):
        until = time.perf_counter() + WARM_UP_SECONDS
        while time.perf_counter() < until:
            loader.next_batch()
        start, drawn = time.perf_counter(), 0
        while time.perf_counter() < start + seconds:
            loader.next_batch()
            drawn += BATCH
        return drawn / (time.perf_counter() - start)


def race(world_size: int, lanes: int, lookahead_mb: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Return the images/s of one rank: of its store, of the loader, and of the loader with one shard ahead."""
    store = SlowStore(lanes)
    # The other ranks, which are not here, would read as much.
    dataset = make_dataset(store, int(world_size * lanes / LATENCY_SECONDS * (seconds + WARM_UP_SECONDS + 1)))
    scaled = (lookahead_mb << 20) // world_size * (SIDE * SIDE) // (64 * 64)
    kinds: dict[str, Callable[[], float]] = {
        "store": lambda: measure_store(dataset, lanes, seconds),
        "loader": lambda: measure_loader(dataset, world_size, scaled, seconds),
        "one ahead": lambda: measure_loader(dataset, world_size, 0, seconds),
    }
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind in list(kinds)[:: 1 if number % 2 else -1]:
            rates[kind].append(in_a_process(kinds[kind]))
    return rates


def in_a_process(work: Callable[[], float]) -> float:
    """Return what `work()` returns in a process of its own."""
    context = multiprocessing.get_context("fork")  # this process has no threads, and torch need not be imported again
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(work()))
    process.start()
    rate = float(receiver.recv())
    process.join()
    return rate


def main(folder: Path, *, quick: bool, lookahead_mb: int, lanes: int, note: str) -> None:
    """Measure all numbers of ranks, and write `folder`/data_loading_remote.json; print one line of JSON last."""
    tempfile.tempdir = "/dev/shm"
    rounds, seconds = (2, 1.0) if quick else (3, 2.0)
    cases: list[dict[str, Any]] = []
    for world_size in RANKS:
        rates = race(world_size, lanes, lookahead_mb, rounds, seconds)
        ratios = {kind: [a / b for a, b in zip(rates[kind], rates["store"], strict=True)] for kind in rates}
        share = statistics.median(ratios["loader"])
        cases.append(
            {
                "ranks": world_size,
                "images_per_second_a_rank": {kind: round(statistics.median(values)) for kind, values in rates.items()},
                "share_of_store": round(share, 3),
                "share_of_store_one_ahead": round(statistics.median(ratios["one ahead"]), 3),
                "bar": BAR,
                "holds": share >= BAR,
                "rounds": {kind: [round(rate) for rate in values] for kind, values in rates.items()},
            }
        )
        print(json.dumps(cases[-1]), flush=True)
    result = {
        **describe(),
        "load_average": os.getloadavg()[1],
        "note": note,
        "store": {"latency_seconds": LATENCY_SECONDS, "requests_at_once_a_rank": lanes, "shard_images": SHARD_IMAGES},
        "lookahead_mb_of_64_pixel_images": lookahead_mb,
        "cases": cases,
    }
    if not quick:
        (folder / "data_loading_remote.json").write_text(json.dumps(result, indent=1) + "\n")
    shares = {f"share_of_store_{case['ranks']}": case["share_of_store"] for case in cases}
    print(json.dumps({**shares, "holds": all(case["holds"] for case in cases)}))
