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

BLOCKS = "blocks of pixels (.npy), which only a build reads"
"""The note on packed shards."""
LARGEST_LABELS = 16 << 20
"""Bytes of the largest .json or .cls that is read."""

_IMAGE, _CLASS, _JSON, _TEXT, _BLOCK = range(5)
_KINDS = {
    **{name.encode(): _IMAGE for name in IMAGES},
    b"cls": _CLASS,
    b"json": _JSON,
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
        names = batch.names
        kinds, keys = _kinds_and_keys(names)
        images = np.arange(len(names))
        if kinds.count(_IMAGE) < len(names):
            self._add_others(batch, kinds, keys)
            images = np.array([row for row, kind in enumerate(kinds) if kind == _IMAGE], np.int64)
            names, keys = [names[row] for row in images], [keys[row] for row in images]
        if names:
            self._names += names
            self._keys += keys
            self._add_images(batch, images)

    def _add_others(self, batch: Batch, kinds: list[int | None], keys: list[bytes]) -> None:
        """Take the files that are no images."""
        columns = (batch.starts.tolist(), batch.sizes.tolist(), batch.limits.tolist(), kinds, keys)
        for row, (start, size, limit, kind, key) in enumerate(zip(*columns, strict=True)):
            if kind in (_CLASS, _JSON):
                self._companions[key] = None
                if start + size <= limit:
                    data = batch.data[start : start + size]
                elif size <= LARGEST_LABELS and row not in batch.sparse:
                    data = self._file.read(int(batch.offsets[row]), size)
                else:
                    data = b"{"
                if kind == _CLASS and data.isdigit() and size < 18 and data[0] != 48:  # the usual, and it need be quick
                    self._add_labels(key, {"label": int(data)})
                else:
                    self._read_labels(key, data, "cls" if kind == _CLASS else "json")
            elif kind == _TEXT:
                self._companions[key] = None
                self._notes["captions (.txt)"] += 1
            elif kind == _BLOCK:
                self._notes[BLOCKS] += 1
            elif kind is None:
                self._notes["files that are neither images nor labels"] += 1

    def _read_labels(self, key: bytes, data: bytes, suffix: str) -> None:
        some = labels_in(data, suffix) if len(data) <= LARGEST_LABELS else None
        if some is None:
            self._notes[".json and .cls files that cannot be read, and give no labels"] += 1
        else:
            self._add_labels(key, label_row(some, 0, 1))

    def _add_labels(self, key: bytes, some: dict[str, Any]) -> None:
        if key in self._labels:
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
        twice = len(set(self._keys)) < len(self._keys)
        samples: dict[bytes, int] = {}
        if twice or self._companions:
            samples = dict(zip(reversed(self._keys), range(len(self._keys) - 1, -1, -1), strict=True))
        if twice:
            for row, key in enumerate(self._keys):
                if (other := samples[key]) != row and row not in reasons:
                    same = self._names[other] == self._names[row]
                    reasons[row] = "its name is in its tar twice" if same else "a second image under its key"
        prefix = shown + "/"
        refused = [
            (prefix + self._names[row].decode("utf-8", "backslashreplace"), reasons[row]) for row in sorted(reasons)
        ]
        for key in self._companions:
            if key not in samples:
                refused.append((prefix + key.decode("utf-8", "backslashreplace"), "a sample without an image"))
        names, keys = self._names, self._keys
        if reasons:
            kept = np.ones(len(places), bool)
            kept[list(reasons)] = False
            places, good = places[kept], np.flatnonzero(kept).tolist()
            names, keys = [names[row] for row in good], [keys[row] for row in good]
        rows = [self._labels.get(key, {}) for key in keys] if self._labels else []
        if any("key" in labels for labels in rows):
            self._notes["labels named 'key', which is the name of the image itself"] += 1
            for labels in rows:
                labels.pop("key", None)
        return IndexedTar(
            bytes=self._file.length,
            etag=self._file.etag,
            ending=ending,
            offset=places[:, 0].copy(),
            size=places[:, 1].copy(),
            width=places[:, 2].astype(np.int32),
            height=places[:, 3].astype(np.int32),
            key=Texts.of(names, prefix.encode("utf-8", "surrogateescape")),
            labels=label_columns(rows) if rows else {},
            refused=refused,
            notes=self._notes,
        )


def _kinds_and_keys(names: list[bytes]) -> tuple[list[int | None], list[bytes]]:
    """Return the kinds of files by their names, None for those that belong to no sample, and the keys of samples."""
    text = b"\0".join(names) + b"\0"
    plain = not any(start in b"\0" + text for start in (b"\0__", b"\0.", b"/."))
    end = names[0].rpartition(b".")[2]
    if plain and end in _KINDS and text.count(b".") == text.count(b"." + end + b"\0") == len(names):
        # As tars of images alone mostly are: all of them at once.
        return [_KINDS[end]] * len(names), text.replace(b"." + end + b"\0", b"\0")[:-1].split(b"\0")
    # One after another over all names, because that is four times as quick as all of it for each.
    bases = [name[name.rfind(b"/") + 1 :] for name in names] if b"/" in text else names
    ends = [base.partition(b".")[2] for base in bases]
    keys = [name[: -1 - len(end)] for name, end in zip(names, ends, strict=True)]
    if plain and None not in (kinds := [_KINDS.get(end) for end in ends]):
        return kinds, keys
    return [_kind(name, base) for name, base in zip(names, bases, strict=True)], keys


def _kind(name: bytes, base: bytes) -> int | None:
    """Return the kind of a file from its name and its base name; None is one that belongs to no sample.

    As webdataset has it, a sample's name ends at the first dot, and what lies in a folder `__NAME__` is a note on
    the tar.
    """
    stem, _, end = base.partition(b".")
    first, slash, _ = name.partition(b"/")
    if not stem or (slash and len(first) >= 4 and first.startswith(b"__") and first.endswith(b"__")):
        return None
    return _KINDS.get(end.rpartition(b".")[2].lower())
