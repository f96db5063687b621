"""Arrays of images: .npz and .npy of numpy, and HDF5. `images` (N, H, W, C) with `labels` (N,), and variants."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import DataError, UsageError, first_line
from pipeline.common.imaging import BadImage, Picture
from pipeline.common.shapes.frame import premultiply
from pipeline.data.dataset import LabelType
from pipeline.data.sources.interface import KEY, Item, Listing
from pipeline.data.sources.packed import hdf5, numpy_files

IMAGES = ("images", "image", "imgs", "img", "x", "data", "arr_0", "pixels", "samples", "pictures")
"""Names of arrays of images, without the split in them. Of several the first is taken."""
LABELS = ("labels", "label", "y", "targets", "target", "classes", "class", "arr_1")
"""Names of arrays of labels that become the label `label`."""
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
LABEL_KINDS: dict[str, LabelType] = {
    "b": "bool",
    "i": "int",
    "u": "int",
    "f": "float",
    "U": "str",
    "S": "str",
    "O": "str",
}
HDF5 = (".h5", ".hdf5", ".hdf", ".he5")


class Array(NamedTuple):
    """An array in a file: what describes it, and what opens it in any process."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """numpy's letter for the kind of its values; `E` for encoded pictures."""
    open: Callable[..., Any]
    place: tuple[Any, ...]
    """Arguments of `open`."""

    def values(self) -> Any:
        """Return what can be indexed to get values."""
        return self.open(*self.place)


class Cell(NamedTuple):
    """Where an image is."""

    open: Callable[..., Any]
    place: tuple[Any, ...]
    number: int
    """Which of the images."""
    form: str
    """How an image lies in its array: `encoded`, or its dimensions: HW, HWC, CHW, or `planes` of a flat row."""
    bytes: int


@dataclass(frozen=True)
class Arrays:
    """One file of arrays. `split` chooses among those of train, val and test; `column` names the array of images."""

    location: str
    split: str | None = None
    column: str | None = None

    def listing(self) -> Listing:
        """Return the images; arrays of as many numbers or texts are their labels."""
        listing = Listing({})
        module = hdf5 if self.location.partition("?")[0].lower().endswith(HDF5) else numpy_files
        arrays = [Array(*found) for found in module.find_arrays(self.location, listing)]
        splits: dict[str, list[tuple[str, Array]]] = {}
        for array in arrays:
            split, role = _role(array.name)
            splits.setdefault(split, []).append((role, array))
        images = {split: found for split, roles in splits.items() if (found := self._images(roles)) is not None}
        if not images:
            known = ", ".join(f"{array.name} {array.shape}" for array in arrays[:12]) or "nothing"
            raise DataError(f"{self.location}: no array of images (N, H, W, C) among its arrays: {known}")
        for split in self._chosen(sorted(images)):
            self._list(listing, split, images[split], splits[split], splits.get("", []))
        if not listing.items:
            raise DataError(f"{self.location}: its arrays hold no images")
        return listing

    def _images(self, roles: list[tuple[str, Array]]) -> Array | None:
        """Return the array of images among those of a split."""
        fitting = [(role, array) for role, array in roles if _form(array) is not None]
        if self.column is not None:
            return next((array for _, array in roles if array.name == self.column and _form(array)), None)
        named = [array for name in IMAGES for role, array in fitting if role == name]
        deep = [array for _, array in fitting if len(array.shape) >= 3 or array.kind == "E"]
        if named:
            return named[0]
        if len(deep) > 1:
            names = ", ".join(array.name for array in deep)
            raise UsageError(f"{self.location}: several arrays of images ({names}); choose with --column")
        return deep[0] if deep else None

    def _chosen(self, splits: list[str]) -> list[str]:
        if self.split == "all" or splits == [""] or (self.split is None and len(splits) == 1):
            if self.split not in (None, "all"):
                raise UsageError(f"--split {self.split}: {self.location} has no splits")
            return splits
        wanted = SPLITS.get(self.split or "train", self.split or "train")
        if wanted not in splits:
            raise UsageError(f"--split {wanted}: {self.location} has {', '.join(filter(None, splits))}, all")
        return [wanted]

    def _list(
        self,
        listing: Listing,
        split: str,
        images: Array,
        beside: list[tuple[str, Array]],
        common: list[tuple[str, Array]],
    ) -> None:
        """Add the images of a split with their labels."""
        form = _form(images)
        assert form is not None
        count = images.shape[0]
        columns: dict[str, tuple[LabelType, Any]] = {}
        for role, array in [*beside, *(common if beside is not common else [])]:
            shape = array.shape[:1] if array.shape[1:] == (1,) else array.shape
            if array is images or array.kind == "E":
                continue
            name = "label" if role in LABELS else role
            if shape != (count,) or array.kind not in LABEL_KINDS or name == KEY:
                listing.notes.append(f"the array {array.name} {array.shape} was passed over: no value for each image")
            elif name not in columns:
                columns[name] = LABEL_KINDS[array.kind], _texts(self._read(array).reshape(-1))
        types: dict[str, LabelType] = {name: kind for name, (kind, _) in columns.items()}
        if listing.items and types != listing.labels:
            raise DataError(f"{self.location}: its splits have other labels than each other; choose one with --split")
        listing.labels = types
        size = int(np.prod(images.shape[1:])) if form != "encoded" else 0
        rows = zip(*(values for _, values in columns.values()), strict=True) if columns else [()] * count
        prefix = f"{split}/" if split else ""
        listing.items.extend(
            Item(f"{prefix}{index:08d}", tuple(row), Cell(images.open, images.place, index, form, size))
            for index, row in enumerate(rows)
        )

    def _read(self, array: Array) -> NDArray[Any]:
        """Return all of an array. Raises DataError when it is damaged."""
        try:
            return np.asarray(array.values()[:])
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(f"{self.location}: the array {array.name} is damaged: {first_line(error)[:200]}") from None

    def read(self, item: Item) -> Picture:
        """Return the numbers (H, W, C), or an encoded picture."""
        cell: Cell = item.where
        values = cell.open(*cell.place)
        try:
            found = values[cell.number]
        except (ValueError, RuntimeError, KeyError, IndexError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise BadImage(f"unreadable ({type(error).__name__})") from None
        if cell.form == "encoded":
            return np.asarray(found, np.uint8).tobytes()
        return as_picture(np.asarray(found), cell.form)


def as_picture(image: NDArray[Any], form: str) -> NDArray[Any]:
    """Return the numbers of an image as (H, W, C); true is 255, and RGBA of 8 bits is multiplied by its alpha."""
    if form == "planes":
        side = isqrt(image.size // 3) if isqrt(image.size // 3) ** 2 * 3 == image.size else isqrt(image.size)
        image = image.reshape(-1, side, side)
    if form in ("planes", "CHW"):
        image = image.transpose(1, 2, 0)
    image = image[:, :, None] if image.ndim == 2 else image
    if image.dtype == np.bool_:
        image = image.astype(np.uint8) * 255
    return premultiply(image) if image.shape[2] == 4 and image.dtype == np.uint8 else np.ascontiguousarray(image)


def _form(array: Array) -> str | None:
    """Return how an image lies in an array (N, …), or None if the array holds no images."""
    inner = array.shape[1:]
    if array.kind == "E":
        return "encoded" if not inner else None
    if array.kind not in "buif" or not array.shape or 0 in array.shape:
        return None
    if len(inner) == 2:
        return "HW"
    if len(inner) == 3:
        return "HWC" if inner[2] in (1, 3, 4) else "CHW" if inner[0] in (1, 3, 4) else None
    if len(inner) == 1 and inner[0] >= 64:
        third, whole = inner[0] // 3, inner[0]
        return "planes" if isqrt(third) ** 2 * 3 == whole or isqrt(whole) ** 2 == whole else None
    return None


def _role(name: str) -> tuple[str, str]:
    """Return the split in the name of an array, or "", and what is left of the name."""
    words = re.split(r"[/_.\s-]+", name.strip("/"))
    split = next((SPLITS[word.lower()] for word in words if word.lower() in SPLITS), "")
    left = [word for word in words if not split or word.lower() not in SPLITS]
    return split, "_".join(left).lower() if split else name.strip("/").lower()


def _texts(values: NDArray[Any]) -> list[Any]:
    """Return labels as Python values; bytes as texts, and no number as None."""
    result: list[Any] = []
    for found in values.tolist():
        value = found.decode("utf-8", "replace") if isinstance(found, bytes) else found
        missing = value is None or (isinstance(value, float) and value - value != 0)
        result.append(None if missing else value if isinstance(value, bool | int | float) else str(value))
    return result
