"""Pictures as people keep them, in any form that `dcgan-data build` reads, opened as a data set for one measurement."""

import atexit
import os
import shutil
import tempfile
from collections import Counter
from itertools import islice
from typing import ClassVar, cast

from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import BadImage, Picture, open_image
from pipeline.common.machine import available_cores
from pipeline.common.shapes.size import Channels, in_words, written
from pipeline.common.storage import is_url
from pipeline.data.build import builder
from pipeline.data.build.options import DEFAULT_QUALITY, BuildOptions
from pipeline.data.build.plan import Selection, plan_build
from pipeline.data.build.transform import Made, Recipe
from pipeline.data.dataset import Dataset, LabelType
from pipeline.data.shard_reader import iterate
from pipeline.data.sources.interface import Item, Listing, Source, gathered, read_picture
from pipeline.data.sources.recognize import Recognized, recognize
from pipeline.data.sources.registry import open_source

Shape = tuple[int, int, int]
"""Height, width and channels of an image."""
SIDES: dict[str, LabelType] = {"picture_height": "int", "picture_width": "int"}
"""The labels that hold a picture's own size."""
FILTER = "Pillow's Lanczos filter, antialiased"
FOLDER = "a folder of pictures"
EXPECTED = "a data set, tars or pictures"
PROBED = 64
"""Pictures of which the first usable one gives the size, and all of them whether the set is gray."""

_opened: dict[tuple[str, Shape | None], tuple[int | None, Dataset]] = {}
"""What this process has opened, with the number of images asked for."""


class _Measured(Recipe):
    """A recipe that also notes the size that each picture had."""

    extra_labels: ClassVar[dict[str, LabelType]] = SIDES

    def make(self, item: Item, picture: Picture) -> list[Made]:
        """Return the image with the picture's height and width behind its labels. Raises BadImage."""
        height, width, _ = _shape(picture)
        return [(key, image, (*labels, height, width)) for key, image, labels in super().make(item, picture)]


def open_pictures(location: str, shape: Shape | None = None, limit: int | None = None) -> Dataset:
    """Return a data set of the pictures in a folder, archive, table or array, which lives as long as this process.

    It holds the images that `dcgan-data build` stores of the source that it recognizes, in the same order, or the first
    `limit` of them. They become (height, width, channels) `shape`; without one they keep their size.
    `source["preparation"]` says what was done to them. Raises UsageError when they are not all of one size and there is
    no `shape`, DataError when there are none, or too many that cannot be used.
    """
    limited, dataset = _opened.get((location, shape), (0, None))
    if dataset is None or (limited is not None and (limit is None or limit > limited)):
        dataset = _build(location, shape, limit)
        _opened[location, shape] = limit, dataset
    return dataset


def _build(location: str, shape: Shape | None, limit: int | None) -> Dataset:
    kind, what = _recognized(location)
    source, description = open_source(kind, location, {})
    advice = f"dcgan-data build {kind} {location} OUT --size N, and name OUT"
    listing = _listing(location, kind, source, advice)
    height, width, channels = shape or _first_shape(location, source, listing)
    recipe = _Measured(
        size=written(width, height),
        channels=cast(Channels, channels),
        encoding="packed",
        quality=DEFAULT_QUALITY["packed"],
        min_side=1,
    )
    plan = plan_build(
        source,
        listing,
        description,
        Selection(seed=0, limit=limit),
        recipe,
        shard_bytes=BuildOptions.shard_bytes,
        shard_images=None,
    )
    out = tempfile.mkdtemp(prefix="dcgan-pictures-")
    atexit.register(shutil.rmtree, out, ignore_errors=True)
    dataset = builder.run(source, listing, plan, recipe, location=location, out=out, workers=available_cores())
    assert dataset is not None  # not a part
    sizes = Counter[tuple[int, int]]()
    for _, labels in iterate(dataset, labels=True):
        sizes.update(zip(*(labels[name] for name in SIDES), strict=True))
    if shape is None and len(sizes) > 1:
        least, most = min(map(min, sizes)), max(map(max, sizes))
        raise UsageError(
            f"{location}: its pictures have sides of {least} to {most} pixels, not all one size; choose it: {advice}"
        )
    told = {
        **dataset.source,
        "listed": len(listing.items),
        "preparation": _preparation(sizes, (height, width), dataset.refused.count)
        + ("" if what == FOLDER else f"; read as {what}"),
    }
    kept = {name: kind for name, kind in dataset.labels.items() if name not in SIDES}
    return dataset.model_copy(update={"source": told, "labels": kept})


def _recognized(location: str) -> Recognized:
    """Return the source that reads what lies there: where nothing says which, a folder of pictures."""
    path = location.removeprefix("file://")
    if not is_url(path) and not os.path.exists(path):  # no name of a data set on the Hub either
        raise DataError(f"{location}: no such file or folder; expected {EXPECTED}")
    try:
        return recognize(location)
    except UsageError:
        if os.path.isfile(path):
            raise
        return Recognized("folder", FOLDER)


def _listing(location: str, kind: str, source: Source, advice: str) -> Listing:
    try:
        return source.listing()
    except UsageError as error:
        raise UsageError(f"{error}; with options: {advice}") from None
    except DataError:
        if kind != "folder" or os.path.isfile(location.removeprefix("file://")):
            raise
        raise DataError(f"{location}: no dataset.json, no tars and no pictures in it; expected {EXPECTED}") from None


def _preparation(sizes: Counter[tuple[int, int]], shape: tuple[int, int], refused: int) -> str:
    """Return what was done to pictures of these (height, width) to make images of `shape`."""
    size = in_words(*reversed(shape))
    changed = sizes.total() - sizes[shape]
    done = f"{sizes.total():,} pictures of {size} pixels, as they are"
    if changed:
        of = (
            in_words(*reversed(next(iter(sizes))))
            if len(sizes) == 1
            else f"{min(map(min, sizes))} to {max(map(max, sizes))}"
        )
        part = "central square" if shape[0] == shape[1] else "central part of that proportion"
        done = (
            f"{changed:,} of {sizes.total():,} pictures (sides of {of} pixels) cropped to their {part} and "
            f"resized to {size} by {FILTER}"
        )
    return done + (f"; {refused:,} that cannot be read are left out" if refused else "")


def _first_shape(location: str, source: Source, listing: Listing) -> Shape:
    """Return the size of the first usable picture, and the most channels of the first pictures: 1 if all are gray."""
    shapes, probed = [], list(islice(listing.items, PROBED))
    with gathered(source, probed) as near:
        for item in probed:
            try:
                shapes.append(_shape(read_picture(near, item)))
            except BadImage:
                continue
    if not shapes:
        raise DataError(f"{location}: none of its first {PROBED} pictures can be read")
    height, width, _ = shapes[0]
    return height, width, max(channels for _, _, channels in shapes)


def _shape(picture: Picture) -> Shape:
    """Return a picture's height, width and channels (1 or 3), by its header. Raises BadImage."""
    if not isinstance(picture, bytes):
        height, width, channels = picture.shape
        return height, width, channels
    image = open_image(picture)
    return image.height, image.width, 1 if image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I") else 3
