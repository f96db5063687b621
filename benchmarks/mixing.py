"""What class-sorted shards do to a batch, and how many shards a stream must mix to mend it.

    python benchmarks/mixing.py

Counts the classes in batches of 128 at random positions of a run, and the total-variation distance between a
batch's classes and the data's, for sets whose shards are sorted by class, against independent uniform draws.
Arithmetic alone: no image is read.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.loading.shuffle import Shuffle

BATCH, BATCHES = 128, 100
STREAMS = (8, 16, 32)
MIX = (1, 2, 4, 8, 16)
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class SortedSet:
    """A set of `classes` equally large classes, one after another in its shards."""

    name: str
    classes: int
    shards: int
    shard_images: int

    def class_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the class of each image, numbered in the data set's own order."""
        return ids * self.classes // (self.shards * self.shard_images)


SETS = (
    SortedSet("10 classes in 128 shards of 1,000", 10, 128, 1_000),
    SortedSet("1,000 classes in 1,024 shards of 1,250 (ImageNet)", 1_000, 1_024, 1_250),
)


def measure(data: SortedSet, batches: NDArray[np.int64]) -> tuple[float, float]:
    """Return the mean number of classes in a batch, and its mean total-variation distance to the data's classes."""
    counts = np.stack([np.bincount(data.class_of(ids), minlength=data.classes) for ids in batches])
    distances = np.abs(counts / BATCH - 1 / data.classes).sum(1) / 2
    return float((counts > 0).sum(1).mean()), float(distances.mean())


def drawn(data: SortedSet, streams: int, mix: int) -> NDArray[np.int64]:
    """Return the images of BATCHES batches at random positions of the first ten epochs."""
    shuffle = Shuffle([data.shard_images] * data.shards, seed=0, streams=streams, mix=mix)
    last = 10 * data.shards * data.shard_images // BATCH
    starts = np.random.default_rng(0).integers(0, last, BATCHES) * BATCH
    return np.stack([shuffle.ids(np.arange(start, start + BATCH)) for start in starts])


def main() -> None:
    """Measure every combination and write benchmarks/results/mixing.{json,md}."""
    lines, results = [], []
    for data in SETS:
        total = data.shards * data.shard_images
        uniform = measure(data, np.random.default_rng(1).integers(0, total, (BATCHES, BATCH)))
        results.append({"set": data.name, "draw": "uniform", "classes": uniform[0], "distance": uniform[1]})
        lines += [
            f"{data.name}; a uniform draw: {uniform[0]:.1f} classes, distance {uniform[1]:.3f}.",
            "",
            "| streams | " + " | ".join(f"k={mix}" for mix in MIX) + " |",
            "|---|" + "---|" * len(MIX),
        ]
        for streams in STREAMS:
            cells = []
            for mix in MIX:
                classes, distance = measure(data, drawn(data, streams, mix))
                results.append(
                    {"set": data.name, "streams": streams, "mix": mix, "classes": classes, "distance": distance}
                )
                cells.append(f"{classes:.1f}, {distance:.3f}")
            lines.append(f"| {streams} | " + " | ".join(cells) + " |")
        lines.append("")
    (RESULTS / "mixing.json").write_text(json.dumps({"batch": BATCH, "batches": BATCHES, "results": results}, indent=1))
    (RESULTS / "mixing.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
