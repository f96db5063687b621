"""Finds all pairs of 128-bit codes within a Hamming radius, without comparing every pair."""

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]


def distances(a: Codes, b: Codes) -> NDArray[np.int64]:
    """Return the Hamming distance of each row of `a` (N, 16) to the same row of `b`."""
    apart: NDArray[np.int64] = np.bitwise_count(a ^ b).sum(axis=-1, dtype=np.int64)
    return apart


def close_pairs(codes: Codes, radius: int) -> NDArray[np.int64]:
    """Return all pairs i < j of rows of `codes` (N, 16) that differ in at most `radius` bits: (P, 3), i, j, distance.

    Cut into radius + 1 pieces, two such codes agree in at least one piece: only rows that share a piece are compared
    (multi-index hashing, Norouzi et al. 2012). Rows must be distinct codes, else their pairs alone may be N²/2.
    """
    bits = np.unpackbits(codes, axis=1)
    found = []
    for piece in np.array_split(np.arange(bits.shape[1]), radius + 1):
        keys = np.packbits(bits[:, piece], axis=1)
        keys = np.ascontiguousarray(keys).view(f"V{keys.shape[1]}").ravel()
        _, group = np.unique(keys, return_inverse=True)
        order = np.argsort(group, kind="stable")
        found.append(_pairs_in_runs(codes, order, group[order], radius))
    return np.unique(np.concatenate(found), axis=0)


def _pairs_in_runs(codes: Codes, order: NDArray[np.int64], group: NDArray[np.int64], radius: int) -> NDArray[np.int64]:
    """Return the close pairs among rows that stand in `order` within runs of equal `group`."""
    found = [np.empty((0, 3), np.int64)]
    starts = np.arange(len(order))
    words = np.ascontiguousarray(codes[order]).view(np.uint64)  # in this order, comparing reads memory in a line
    step = 0
    while True:
        step += 1  # compare each row with the one `step` further on, as long as that is in its run
        starts = starts[starts + step < len(order)]
        starts = starts[group[starts] == group[starts + step]]
        if not len(starts):
            return np.concatenate(found)
        apart = np.bitwise_count(words[starts] ^ words[starts + step]).sum(axis=1, dtype=np.uint8)
        near = np.flatnonzero(apart <= radius)
        if len(near):
            pairs = np.stack([order[starts[near]], order[starts[near] + step]], 1)
            found.append(np.column_stack([pairs.min(1), pairs.max(1), apart[near]]))
