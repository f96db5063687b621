"""Whether a data set's own order is sorted by a label: then images that follow each other are alike."""

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index.labels import Labels
from pipeline.data.index.sidecar import Texts

LIMIT = 0.5
"""Share of the way from a random order (0) to one in which all neighbors agree (1) above which a set is sorted."""


def sorted_labels(labels: Labels) -> dict[str, float]:
    """Return the labels by which the images are sorted, each with how far, in (LIMIT, 1].

    With a the share of images whose label is that of the image before, and r that share in a random order (the sum
    of the squares of the classes' shares), it is (a - r) / (1 - r). Labels of one value, and those that nearly every
    image has for itself, are passed over.
    """
    found = {}
    for name, typed in labels.items():
        codes = _codes(typed.column.values)
        counts = np.unique(codes, return_counts=True)[1]
        if len(counts) < 2 or len(counts) > len(codes) // 2:
            continue
        random = float(((counts / len(codes)) ** 2).sum())
        agreeing = float((codes[1:] == codes[:-1]).mean())
        if (share := (agreeing - random) / (1 - random)) > LIMIT:
            found[name] = share
    return found


def _codes(values: "NDArray[np.generic] | Texts") -> NDArray[np.generic]:
    """Return numbers or short texts that are equal where the values are."""
    if not isinstance(values, Texts):
        return values
    rows = range(0, len(values), 1 << 16)
    return np.fromiter(
        (hash(text) for start in rows for text in values.encoded(start, start + (1 << 16))), np.int64, len(values)
    )
