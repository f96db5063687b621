"""What a build and a reader hold in memory at the sizes that docs/scaling.md names: listings, shards, checks.

    python benchmarks/listing.py [--pictures 30000000] [--shards 400000] [--checked 10000] [--out FILE]

Each part runs in a process of its own, whose peak of resident memory is the figure. Pictures are made up by a
generator and none is decoded: what is measured is a part's plan (list, hash, sort, digest) and its pictures taken in
their order; the opening of a data set of many shards; `verify` and `merge` over many small ones.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.common.imaging import Pixels
from pipeline.common.partition import Partition
from pipeline.common.storage import Store
from pipeline.data.build import builder
from pipeline.data.build.plan import PlannedBuild, Selection, plan_build
from pipeline.data.build.records import read_records
from pipeline.data.build.state import STATE_FILE, BuildState, Group, finished_groups, group_name, shard_name
from pipeline.data.build.transform import Recipe
from pipeline.data.dataset import Dataset, open_dataset, write_dataset
from pipeline.data.index.sidecar import Texts
from pipeline.data.shard_table import ShardTable
from pipeline.data.shard_writer import ShardWriter, write_shard
from pipeline.data.sources.interface import Item, Items, Listing
from pipeline.data.verify import verify

PARTS = 64
SIDE = 8
MEMBERS = 11
"""Blocks of a packed shard of 32 MB: ten of 256 images at 64×64, and a smaller one."""


@dataclass(frozen=True)
class MadeUp:
    """A source of pictures that nobody took."""

    pictures: int

    def listing(self) -> Listing:
        """Return them, a thousand to a folder, each with a class and a size."""
        items = (Item(f"{i // 1000:06d}/{i:010d}.jpg", (f"{i // 1000:06d}",), 20_000) for i in range(self.pictures))
        return Listing({"class": "str"}, Items(items))

    def read(self, item: Item) -> Pixels:
        """Return a gray picture."""
        return np.full((SIDE, SIDE, 3), 128, np.uint8)


def plan_of(source: MadeUp) -> PlannedBuild:
    """Return the plan of its build."""
    recipe = Recipe(size=SIDE, channels=3, encoding="packed", quality=100, min_side=1)
    return plan_build(
        source,
        source.listing(),
        {"kind": "made up"},
        Selection(seed=0),
        recipe,
        shard_bytes=32_000_000,
        shard_images=2_600,
    )


def plan(pictures: int) -> dict[str, Any]:
    """Plan a build, and take the pictures of one part of it in their order."""
    began, worked = time.perf_counter(), time.process_time()
    planned = plan_of(MadeUp(pictures))
    ended, worked = time.perf_counter(), time.process_time() - worked
    taken = sum(len(planned.group(index)) for index in Partition(1, PARTS).slice(planned.plan.groups))
    return {
        "pictures": pictures,
        "seconds": round(ended - began, 1),
        "processor_microseconds_each": round(worked / pictures * 1e6, 2),
        "pictures_of_a_part": taken,
        "listing": planned.plan.listing,
    }


def write_many(folder: str | Path, shards: int) -> Dataset:
    """Write the dataset.json, and what lies beside it, of a packed data set of `shards` shards; but no shard."""
    rows = np.arange(shards)
    each = 64 * 64 * 3
    sizes = np.full((shards, MEMBERS), 256 * each, np.int64)
    sizes[:, -1] = 40 * each
    offsets = np.cumsum(sizes + 4096, 1) - sizes
    names = np.char.mod("%06d.tar", rows).astype("S10")
    images = np.full(shards, (MEMBERS - 1) * 256 + 40)
    table = ShardTable(
        name=Texts(np.frombuffer(names.tobytes(), np.uint8), 10 * (rows + 1)),
        images=images.astype(np.uint32),
        bytes=(offsets[:, -1] + sizes[:, -1] + 4096).astype(np.uint32),
        sha256=np.random.default_rng(0).integers(0, 256, (shards, 32), np.uint8),
        ends=(MEMBERS * (rows + 1)).astype(np.uint32),
        offset=offsets.reshape(-1).astype(np.uint32),
        size=sizes.reshape(-1).astype(np.uint32),
    )
    dataset = Dataset(
        image_size=64,
        channels=3,
        encoding="packed",
        source={"kind": "made up"},
        images=int(images.sum()),
        bytes=int(table.bytes.sum(dtype=np.int64)),
        shards=table,
    )
    return write_dataset(dataset.at(Store(folder)))


def open_many(folder: str) -> dict[str, Any]:
    """Open a data set, and ask for what every run asks for."""
    began, worked = time.perf_counter(), time.process_time()
    dataset = open_dataset(folder)
    ended, worked = time.perf_counter(), time.process_time() - worked
    fingerprint, last = dataset.fingerprint(), dataset.shards[-1].name
    return {
        "shards": len(dataset.shards),
        "seconds": round(ended - began, 3),
        "processor_seconds": round(worked, 3),
        "seconds_of_the_fingerprint": round(time.perf_counter() - ended, 3),
        "file_bytes": sum(path.stat().st_size for path in Path(folder).iterdir()),
        "fingerprint": fingerprint,
        "last": last,
    }


def check_many(shards: int) -> dict[str, Any]:
    """Merge a build of many tiny shards whose records are all there, and verify it."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        planned = plan_of(MadeUp(shards)).plan.model_copy(update={"groups": shards})
        begun = BuildState(plan=planned, location="made up", refused=[], lost={}, damaged=False)
        store.write(STATE_FILE, begun.model_dump_json().encode())
        pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
        for index in range(shards):
            writer = ShardWriter(f"{index:06d}", "packed", ["class"])
            writer.add(pixels, str(index), ["a"])
            shard = write_shard(store, shard_name(index, 0), writer)
            record = Group(shards=[shard], refused=[], skipped=[])
            store.write(group_name(index), record.model_dump_json().encode())
        began = time.perf_counter()
        read_records(dict.fromkeys(finished_groups(store), store))
        read = time.perf_counter()
        dataset = builder.merge(folder, [])
        merged = time.perf_counter()
        verify(dataset)
        return {
            "shards": shards,
            "seconds_to_read_the_records": round(read - began, 2),
            "seconds_to_merge": round(merged - read, 2),
            "seconds_to_verify": round(time.perf_counter() - merged, 2),
        }


def measured(part: Callable[..., dict[str, Any]], argument: object) -> dict[str, Any]:
    """Run one part in a process of its own, and return its figures with the peak of its memory."""
    command = [sys.executable, __file__, "--only", part.__name__, str(argument)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure every part, print the figures, and write them to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pictures", type=int, nargs="*", default=[1_000_000, 10_000_000, 30_000_000])
    parser.add_argument("--shards", type=int, nargs="*", default=[20_000, 400_000])
    parser.add_argument("--checked", type=int, nargs="*", default=[2_500, 10_000])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        name, argument = options.only
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "plan": lambda: plan(int(argument)),
            "open_many": lambda: open_many(argument),
            "check_many": lambda: check_many(int(argument)),
        }
        found = parts[name]()
        print(json.dumps(found | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return
    results: dict[str, list[dict[str, Any]]] = {"plan": [], "open": [], "check": []}
    for pictures in options.pictures:
        results["plan"].append(measured(plan, pictures))
    for shards in options.shards:
        with tempfile.TemporaryDirectory() as folder:
            write_many(folder, shards)
            results["open"].append(measured(open_many, folder))
    for shards in options.checked:
        results["check"].append(measured(check_many, shards))
    text = json.dumps(results, indent=1)
    if options.out:
        from hardware import describe

        options.out.write_text(json.dumps({**describe(), **results}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
