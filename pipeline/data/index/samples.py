"""What a tar's files are to WebDataset: images, and the labels beside them."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.imaging import MAX_PIXELS, BadImage
from pipeline.data.index.image_size import image_sizes, size_of
from pipeline.data.index.labels import Labels, label_columns
from pipeline.data.index.reader import OpenTar
from pipeline.data.index.scan import Batch, Ending, scan
from pipeline.data.index.sidecar import Texts
from pipeline.data.sources.tars import IMAGES, label_row, labels_in

LARGEST_LABELS = 16 << 20
"""Bytes of the largest .json or .cls that is read."""

_IMAGE, _LABELS, _TEXT, _BLOCK = range(4)
_KINDS = {
    **{name.encode(): _IMAGE for name in IMAGES},
    **dict.fromkeys((b"json", b"cls"), _LABELS),
    b"txt": _TEXT,
    b"npy": _BLOCK,
}


@dataclass(frozen=True)
class IndexedTar:
    """The images of one tar: columns with a row for each, and what was left out."""

    bytes: int
    """Size of the tar."""
    etag: str | None
    ending: Ending
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    key: Texts
    labels: Labels
    refused: list[tuple[str, str]]
    """Samples that cannot be used, as (name, reason)."""
    notes: Counter[str]
    """What was passed over, counted by what it is."""


def index_tar(file: OpenTar, shown: str, *, min_side: int) -> IndexedTar:
    """Return what a tar holds; names begin with `shown`. Raises UserError when it cannot be read.

    A damaged tar raises nothing: `IndexedTar.ending` says it, and the rest is what precedes the damage.
    """
    found, ending = scan(file, lambda: _Files(file))
    return found.finish(shown, ending, min_side)


class _Files:
    """Collects the files of a tar."""

    def __init__(self, file: OpenTar) -> None:
        self._file = file
        self._names: list[bytes] = []  # of the images
        self._keys: list[bytes] = []  # of their samples
        self._places: list[NDArray[np.int64]] = []  # (n, 4) offset, bytes, width, height
        self._reasons: dict[int, str] = {}  # why an image cannot be used
        self._labels: dict[bytes, dict[str, Any]] = {}
        self._companions: dict[bytes, None] = {}  # keys of samples that something but an image belongs to
        self._notes: Counter[str] = Counter()

    def add(self, batch: Batch) -> None:
        """Take some files."""
        images: list[int] = []
        for row, name in enumerate(batch.names):
            slash = name.rfind(b"/") + 1
            dot = name.find(b".", slash)
            suffix = name[name.rfind(b".") + 1 :]
            kind = _KINDS.get(suffix)
            if kind is None:
                kind = _KINDS.get(suffix.lower())
            if dot <= slash or kind is None or (name.startswith(b"__") and _is_meta(name)):
                self._notes["files that are neither images nor labels"] += 1
            elif kind == _IMAGE:
                images.append(row)
                self._names.append(name)
                self._keys.append(name[:dot])
            elif kind == _BLOCK:
                self._notes["blocks of pixels (.npy), which only a build reads"] += 1
            else:
                self._companions[name[:dot]] = None
                if kind == _LABELS:
                    self._read_labels(batch, row, name[:dot], suffix.lower().decode())
                else:
                    self._notes["captions (.txt)"] += 1
        if images:
            self._add_images(batch, np.array(images, np.int64))

    def _read_labels(self, batch: Batch, row: int, key: bytes, suffix: str) -> None:
        start, size = int(batch.starts[row]), int(batch.sizes[row])
        if size > LARGEST_LABELS or row in batch.sparse:
            some = None
        elif start + size <= batch.limits[row]:
            some = labels_in(batch.data[start : start + size], suffix)
        else:
            some = labels_in(self._file.read(int(batch.offsets[row]), size), suffix)
        if some is None:
            self._notes[".json and .cls files that cannot be read, and give no labels"] += 1
        elif key in self._labels:
            self._labels[key].update(some)
        else:
            self._labels[key] = some

    def _add_images(self, batch: Batch, rows: NDArray[np.int64]) -> None:
        """Find the sizes of the images at `rows`, the last ones of those whose names are known."""
        starts, sizes = batch.starts[rows], batch.sizes[rows]
        first = len(self._names) - len(rows)
        widths, heights = image_sizes(batch.data, starts, np.minimum(batch.limits[rows], starts + sizes))
        for place in np.flatnonzero((widths == 0) | (heights == 0)).tolist():
            row = int(rows[place])
            if row in batch.sparse:
                self._reasons[first + place] = "a sparse file"
                continue
            try:
                widths[place], heights[place] = size_of(self._file, int(batch.offsets[row]), int(batch.sizes[row]))
            except BadImage as error:
                self._reasons[first + place] = str(error)
        self._places.append(np.stack([batch.offsets[rows], sizes, widths, heights], 1))

    def finish(self, shown: str, ending: Ending, min_side: int) -> IndexedTar:
        """Return the images that can be used, and the samples that cannot."""
        places = np.concatenate(self._places) if self._places else np.zeros((0, 4), np.int64)
        reasons = self._reasons
        for row in np.flatnonzero(places[:, 2] * places[:, 3] > MAX_PIXELS).tolist():
            reasons.setdefault(row, "too many pixels")
        for row in np.flatnonzero(places[:, 2:].min(1) < min_side).tolist():
            reasons.setdefault(row, f"smaller than {min_side} pixels")
        samples: dict[bytes, int] = {}
        for row, key in enumerate(self._keys):
            if (other := samples.setdefault(key, row)) != row and row not in reasons:
                same = self._names[other] == self._names[row]
                reasons[row] = "its name is in its tar twice" if same else "a second image under its key"
        prefix = shown + "/"
        refused = [
            (prefix + self._names[row].decode("utf-8", "backslashreplace"), reasons[row]) for row in sorted(reasons)
        ]
        for key in self._companions:
            if key not in samples:
                refused.append((prefix + key.decode("utf-8", "backslashreplace"), "a sample without an image"))
        kept = np.ones(len(places), bool)
        kept[list(reasons)] = False
        good = np.flatnonzero(kept).tolist() if reasons else range(len(places))
        places = places[kept]
        start = prefix.encode("utf-8", "surrogateescape")
        rows = [label_row(self._labels.get(self._keys[row], {}), 0, 1) for row in good] if self._labels else []
        if any("key" in row for row in rows):
            self._notes["labels named 'key', which is the name of the image itself"] += 1
            for row in rows:
                row.pop("key", None)
        return IndexedTar(
            bytes=self._file.bytes,
            etag=self._file.etag,
            ending=ending,
            offset=places[:, 0].copy(),
            size=places[:, 1].copy(),
            width=places[:, 2].astype(np.int32),
            height=places[:, 3].astype(np.int32),
            key=Texts.of([start + self._names[row] for row in good]),
            labels=label_columns(rows) if rows else {},
            refused=refused,
            notes=self._notes,
        )


def _is_meta(name: bytes) -> bool:
    """Whether webdataset takes a file for a note on the tar, not for part of a sample: it lies in `__NAME__/`."""
    first, slash, _ = name.partition(b"/")
    return bool(slash) and len(first) >= 4 and first.endswith(b"__")
