"""`dcgan-data show --html`: a data set as one self-contained page: classes, sizes, what was left out, what is twice."""

import base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageFile

from pipeline.common.errors import UsageError, escaped
from pipeline.common.imaging import BadImage, Pixels, encode, grid, in_frame, open_image, reframe, upright
from pipeline.common.progress import Progress
from pipeline.common.shapes.frame import Frame, over_checkerboard
from pipeline.common.storage import write_atomic
from pipeline.data.build.builder import SIZE_STEPS
from pipeline.data.build.state import REFUSED, SKIPPED
from pipeline.data.dataset import Dataset
from pipeline.data.shard_reader import Columns, iterate
from pipeline.data.sources.interface import gathered, printable, read_picture
from pipeline.data.sources.registry import SOURCES, open_source

MOST_IMAGES = 500_000
"""Images that are looked at; of a larger set as many at equal distances stand for all."""
INDEXED_IMAGES = 5_000
"""The same of an indexed set, whose images are decoded and resized as they are read."""
SHOWN_BARS, SHOWN_GROUPS, SHOWN_REFUSED = 30, 24, 8
"""Values of a label, groups of equal images, and pictures of a reason that the page shows."""
LARGEST_PICTURE = 2048
"""Longer side of a picture in the page, in pixels."""
THUMBNAIL = 96
"""Side of a picture that was left out, in pixels."""


class Bar(NamedTuple):
    """One line of a chart of bars."""

    name: str
    number: int
    share: float
    """Of the longest bar, in percent."""


class Reason(NamedTuple):
    """Why pictures were left out."""

    words: str
    number: int
    pictures: list[tuple[str, str]]
    """Some of them: name, and the picture as a data: URL, or "" where nothing of it can be seen."""


@dataclass
class Seen:
    """What one pass over the images found."""

    images: int = 0
    columns: Columns = field(default_factory=dict)
    sheet: list[Pixels] = field(default_factory=list)
    groups: dict[bytes, list[str]] = field(default_factory=dict)
    """Names of images that are equal in every pixel, by their hash."""
    examples: dict[bytes, Pixels] = field(default_factory=dict)


def write_page(dataset: Dataset, path: Path, images: int, source: str | None = None) -> None:
    """Write the page. `source` is the SRC of the build: pictures that were left out are shown from there.

    Raises UserError.
    """
    reasons = _reasons(dataset, source)
    seen = _look(dataset, images)
    rows = [_bars(name, kind, seen.columns[name]) for name, kind in dataset.labels.items()]
    equal = sorted(seen.groups.items(), key=lambda group: (-len(group[1]), group[1]))
    shown = [group for group in equal if group[0] in seen.examples][:SHOWN_GROUPS]
    content = {
        "title": dataset.location.rstrip("/").rpartition("/")[2] or dataset.location,
        "facts": {
            "images": f"{dataset.images:,}",
            "width × height × channels": dataset.in_words,
            "shards": f"{len(dataset.shards):,}, {dataset.bytes / 1e6:,.1f} MB as {dataset.encoding}",
            "left out": f"{dataset.refused.count:,}",
        },
        "options": {
            name: escaped(str(value))
            for name, value in dataset.source.items()
            if value not in (None, [], "") and name != "sizes"
        },
        "fingerprint": dataset.fingerprint(),
        "sheet": _url(grid(np.concatenate(seen.sheet), max(1, int(np.ceil(np.sqrt(1.5 * images)))), gap=2)),
        "seen": seen.images,
        "whole": seen.images == dataset.images,
        "labels": rows,
        "sizes": _sizes(dataset),
        "reasons": reasons,
        "source": source,
        "twice": sum(len(names) - 1 for _, names in equal),
        "groups": [
            (_url(seen.examples[key]), [escaped(name) for name in names[:6]], max(0, len(names) - 6))
            for key, names in shown
        ],
        "more_groups": len(equal) - len(shown),
    }
    write_atomic(path, _template().render(content).encode())


def _look(dataset: Dataset, shown: int) -> Seen:
    """Read the images once: labels, the first `shown`, and which are equal in every pixel."""
    limit = min(dataset.images, MOST_IMAGES if dataset.index is None else INDEXED_IMAGES)
    seen, first = Seen(), dict[bytes, str]()
    with Progress("looking at", limit, "images") as progress:
        for batch, columns in iterate(dataset, labels=True, limit=limit):
            if seen.images < shown:
                seen.sheet.append(batch[: shown - seen.images])
            for name, values in columns.items():
                if name != "key":
                    seen.columns.setdefault(name, []).extend(values)
            for image, name in zip(batch, columns["key"], strict=True):
                key = blake2b(image.tobytes(), digest_size=16).digest()
                before = first.setdefault(key, name)
                if before is not name:
                    seen.groups.setdefault(key, [before]).append(name)
                    if len(seen.examples) < 10 * SHOWN_GROUPS or key in seen.examples:
                        seen.examples[key] = image.copy()
            seen.images += len(batch)
            progress.advance(len(batch))
    return seen


def _bars(name: str, kind: str, values: Sequence[Any]) -> tuple[str, str, list[Bar], int]:
    """Return a label's name, a line about it, its bars, and how many values have none."""
    present = [value for value in values if value is not None]
    without = len(values) - len(present)
    words = f"{len(present):,} images" + (f", {without:,} without a value" if without else "")
    distinct = Counter(present)
    if kind in ("bool", "str") or len(distinct) <= SHOWN_BARS:
        counted = distinct.most_common() if kind == "str" else sorted(distinct.items())
        return name, words, _scaled([(str(value), number) for value, number in counted[:SHOWN_BARS]]), len(counted)
    finite = np.array(present, float)
    numbers, edges = np.histogram(finite[np.isfinite(finite)], 20)
    steps = [f"{low:.4g} to {high:.4g}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    return name, words, _scaled(list(zip(steps, numbers.tolist(), strict=True))), len(steps)


def _scaled(counted: list[tuple[str, int]]) -> list[Bar]:
    most = max((number for _, number in counted), default=1) or 1
    return [Bar(escaped(name), number, round(100 * number / most, 1)) for name, number in counted]


def _sizes(dataset: Dataset) -> list[Bar]:
    """Return the sizes that the pictures had before they were resized, as the build counted them."""
    sizes = dataset.source.get("sizes")
    if not isinstance(sizes, dict):
        return []
    counted = []
    for low, above in pairwise((*SIZE_STEPS, None)):
        if isinstance(number := sizes.get(str(low)), int):
            counted.append((f"{low:,} to {above - 1:,} px" if above else f"from {low:,} px", number))
    return _scaled(counted)


def _reasons(dataset: Dataset, source: str | None) -> list[Reason]:
    """Return why pictures were left out, the most frequent reason first, with some of them."""
    counts = Counter({escaped(words): number for words, number in dataset.refused.reasons.items()})
    named: dict[str, list[str]] = {}
    for file in (REFUSED, SKIPPED):
        text = dataset.store.read(file).decode("utf-8", "replace") if dataset.store.exists(file) else ""
        for name, _, words in (line.partition("\t") for line in text.splitlines()):
            counts[words] += file == SKIPPED  # of these dataset.json has no number
            if len(some := named.setdefault(words, [])) < SHOWN_REFUSED:
                some.append(name)
    found = _find(dataset, source, {name for some in named.values() for name in some}) if source and named else {}
    ordered = sorted(counts.items(), key=lambda reason: (-reason[1], reason[0]))
    return [
        Reason(words, number, [(name, found.get(name, "")) for name in named.get(words, [])])
        for words, number in ordered
    ]


def _find(dataset: Dataset, source: str, names: set[str]) -> dict[str, str]:
    """Return pictures of a source, by their names as refused.txt has them, as data: URLs."""
    kind = dataset.source.get("kind")
    if kind not in SOURCES:
        raise UsageError(f"--source {source}: {dataset.location} was not built from pictures")
    taken = SOURCES[kind].options
    recorded = {**dataset.source, "split": dataset.source.get("source_split"), "labels": "none"}
    options = {name: recorded[name] for name in taken if recorded.get(name) is not None}
    opened, _ = open_source(kind, source, options)
    wanted = [item for item in opened.listing().items if escaped(printable(item.key)) in names]
    found = {}
    with gathered(opened, wanted) as near:
        for item in wanted:
            try:
                found[escaped(printable(item.key))] = _thumbnail(read_picture(near, item))
            except BadImage:
                continue
    return found


def _thumbnail(picture: Any) -> str:
    """Return what can be seen of a picture, even if it is cut off. Raises BadImage."""
    frame = Frame(THUMBNAIL, 3, fit="pad", fill="#808080")
    if not isinstance(picture, bytes):
        return _url(reframe(picture, frame))
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        image = open_image(picture)
        image.draft(None, (2 * THUMBNAIL, 2 * THUMBNAIL))
        return _url(in_frame(upright(image, 3), frame))
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _url(image: Pixels) -> str:
    """Return an image as a data: URL."""
    if image.shape[-1] == 4:
        image = over_checkerboard(image[None])[0]
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
    picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    data = encode(np.asarray(picture), "webp", 85)
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"


@cache
def _template() -> Any:
    loader = PackageLoader("pipeline.data", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("dataset.html")
