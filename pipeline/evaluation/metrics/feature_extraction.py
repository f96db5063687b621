"""The features of a set of images, extracted block by block on every rank, and kept in a cache.

Each rank extracts the features of its own blocks, and all ranks get the sum (moments) or the whole (features): no
rank waits while another works.
"""

import io
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import DataError, first_line
from pipeline.common.ranks import Ranks
from pipeline.common.storage import sha256_bytes, spare_bytes, write_atomic
from pipeline.evaluation.images import BLOCK, Images, WithProgress, num_blocks
from pipeline.evaluation.metrics.extractors import Extraction, Extractor
from pipeline.evaluation.metrics.feature_distances import Moments


def extract_moments(images: Images, extractor: Extractor, ranks: Ranks, what: str) -> Moments:
    """Return the moments of a set's features, the same on every rank. Shows the progress under the name `what`."""
    (moments,) = extract_nested_moments(images, extractor, ranks, what, 1)
    return moments


def extract_nested_moments(images: Images, extractor: Extractor, ranks: Ranks, what: str, sets: int) -> list[Moments]:
    """Return the moments of the first images, of twice as many, and so on: up to `sets` sets, the last has them all.

    The sets end with blocks. They are the same on every rank.
    """
    blocks = num_blocks(images.count)
    ends = sorted({-(-blocks * (index + 1) // sets) for index in range(sets)})
    totals: dict[int, Moments] = {}
    for number, extracted in _blocks(images, extractor, ranks, what):
        block, place = Moments.of(extracted.features), bisect_right(ends, number)
        totals[place] = totals[place] + block if place in totals else block
    width = next((len(moments.total) for moments in totals.values()), 0)  # 0: fewer blocks than ranks
    width = int(ranks.sum(np.array([float(width)]))[0]) // _working(images, ranks)
    found: list[Moments] = []
    for place, end in enumerate(ends):
        mine = totals.get(place, Moments(np.zeros(width), np.zeros((width, width)), 0))
        count = min(end * BLOCK, images.count)
        new = Moments(ranks.sum(mine.total), ranks.sum(mine.outer), count - (found[-1].count if found else 0))
        found.append(found[-1] + new if found else new)
    return found


def extract_features(images: Images, extractor: Extractor, ranks: Ranks, what: str | None) -> Extraction:
    """Return the features of a whole set, and class probabilities where the extractor has them, on every rank.

    Shows the progress under the name `what`; None shows nothing.
    """
    found = list(_blocks(images, extractor, ranks, what))
    features = [(block, extracted.features) for block, extracted in found]
    probabilities = [(block, e.probabilities) for block, e in found if e.probabilities is not None]
    joined = []
    for parts in (features, probabilities):
        width = int(ranks.sum(np.array([float(parts[0][1].shape[1]) if parts else 0.0]))[0]) // _working(images, ranks)
        whole = np.zeros((images.count, width))
        for block, part in parts:
            whole[block * BLOCK : block * BLOCK + len(part)] = part
        joined.append(ranks.sum(whole).astype(np.float32) if width else None)
    assert joined[0] is not None
    return Extraction(joined[0], joined[1])


def _working(images: Images, ranks: Ranks) -> int:
    """Return how many ranks have a block."""
    return min(ranks.world_size, num_blocks(images.count))


def _blocks(images: Images, extractor: Extractor, ranks: Ranks, what: str | None) -> Iterator[tuple[int, Extraction]]:
    """Yield this rank's blocks and what is extracted from each."""
    shown = images if what is None else WithProgress(images, what)
    for block, pixels in shown.blocks(ranks.rank, ranks.world_size):
        yield block, extractor.extract(pixels)


def cached(path: Path | None, key: dict[str, Any], make: Callable[[], dict[str, NDArray[Any]]]) -> dict[str, Any]:
    """Return the arrays in the folder `path` for `key`, or make and keep them: not without a path, or room.

    The file's name holds a hash of the key, so statistics of another data set, extractor or size are never used.
    Raises DataError when a file is damaged.
    """
    if path is None:
        return make()
    digest = sha256_bytes(json.dumps(key, sort_keys=True).encode())[:16]
    file = path / f"reference-{digest}.npz"
    if file.exists():
        try:
            with np.load(file, allow_pickle=False) as kept:
                return {name: kept[name] for name in kept.files}
        except Exception as error:  # numpy, zipfile and zlib raise whatever they like at damaged bytes
            raise DataError(f"{file}: damaged ({first_line(error)}); delete it and run the command again") from None
    arrays = make()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    if spare_bytes(path) >= buffer.tell():
        write_atomic(file, buffer.getvalue())
    return arrays
