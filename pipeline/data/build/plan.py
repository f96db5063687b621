"""The plan of a build, made before the images are decoded: the order, the groups of images, the identity.

Every part makes the whole plan, because its identity counts every picture: in little memory, and on its own disk.

A group is a fixed range of the ordered listing, and becomes one shard. Its bytes do not depend on other groups, so
groups can be built in any order, by any process, on any machine, and again after a kill.
"""

import hashlib
import json
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from pydantic import Field

from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import BadImage
from pipeline.common.records import LARGEST, Record
from pipeline.data.build.options import BuildOptions
from pipeline.data.build.order import HASH_BYTES, in_order
from pipeline.data.build.transform import Recipe, Skipped
from pipeline.data.dataset import LabelType
from pipeline.data.shard_writer import RECORD, ShardWriter
from pipeline.data.sources.interface import (
    KEY,
    Item,
    Items,
    Listing,
    Source,
    as_type,
    gathered,
    printable,
    read_picture,
)
from pipeline.data.spool import CHUNK

PROBE_PICTURES = 64
"""Pictures that are encoded beforehand, to estimate how many fill a shard."""
WANTED_SHARDS = 16
"""Shards of a small set, so that all cores have work. A shard has at least MIN_IMAGES pictures, though."""
MIN_IMAGES = 256

_json, _quote = json.JSONEncoder().encode, json.encoder.encode_basestring_ascii
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


class Selection(Record):
    """Which pictures of the listing the build takes."""

    seed: int
    """Seed of the order, and so of what `limit` and the split take."""
    where: tuple[str, ...] = ()
    """Conditions on labels, such as `male=1` or `yaw<10`; all must hold."""
    limit: int | None = None
    """Largest number of pictures; the first in the order are taken."""
    val_fraction: float = 0.0
    """Share of the pictures that belongs to the validation set."""
    split: str = "all"
    """`all`, or with val_fraction `train` or `val`."""


class Plan(Record):
    """The identity of a build. Two builds with equal plans write equal bytes."""

    source: dict[str, Any]
    """Kind and options of the source, the selection, and the recipe."""
    labels: dict[str, LabelType]
    listing: str
    """SHA-256 over the names, labels and sizes of all selected pictures in their order."""
    pictures: int = Field(ge=1, le=LARGEST)
    """Number of selected pictures."""
    groups: int = Field(ge=1, le=LARGEST)
    """Number of groups."""
    shard_bytes: int = Field(ge=1)
    """Largest size of a shard."""


@dataclass
class PlannedBuild:
    """A plan with its pictures, in their order."""

    plan: Plan
    pictures: Items

    def span(self, index: int) -> range:
        """Return which pictures are those of a group: contiguous, and group sizes differ by at most one."""
        total, groups = len(self.pictures), self.plan.groups
        return range(total * index // groups, total * (index + 1) // groups)

    def group(self, index: int) -> list[Item]:
        """Return the pictures of a group."""
        span = self.span(index)
        return self.pictures.slice(span.start, span.stop)


def select(listing: Listing, selection: Selection) -> Iterator[Item]:
    """Yield the chosen pictures in their final order. Raises UserError when none is left."""
    if KEY in listing.labels:
        raise DataError(f"a label is named {KEY!r}, which is reserved for the image's name; rename the column")
    tests = [_condition(text, listing.labels) for text in selection.where]
    matching = (item for item in listing.items if all(test(item.labels) for test in tests))
    hashed = _hasher(selection.seed)
    rows = in_order((hashed(item.key), item.labels, item.where) for item in matching)
    ordered = (Item(key[HASH_BYTES:].decode("utf-8", "surrogateescape"), labels, where) for key, labels, where in rows)
    chosen: Iterator[Item] = islice(_once_each(ordered, listing), selection.limit)
    if (first := next(chosen, None)) is None:
        raise UsageError(f"--where {' '.join(selection.where)}: none of {len(listing.items):,} pictures matches")
    chosen = chain([first], chosen)
    if selection.split != "all":
        wanted = selection.split == "val"
        chosen = (item for item in chosen if in_validation(item.key, selection) is wanted)
        if (first := next(chosen, None)) is None:
            raise UsageError(f"--val-fraction {selection.val_fraction}: the {selection.split} set would be empty")
        chosen = chain([first], chosen)
    return chosen


def _once_each(ordered: Iterator[Item], listing: Listing) -> Iterator[Item]:
    """Yield the pictures without those whose key the one before has: equal keys are neighbors in the order."""
    before = None
    for item in ordered:
        if item.key == before:
            listing.refuse_repeated(item.key)
        else:
            yield item
        before = item.key


def key_hash(seed: int, key: str) -> bytes:
    """Return the 8 bytes by which images are ordered: uniform, and the same on every machine."""
    return _hasher(seed)(key)[:HASH_BYTES]


def _hasher(seed: int) -> Callable[[str], bytes]:
    """Return the function of a key that gives its hash, with the key in UTF-8 behind it."""
    begun = hashlib.blake2b(digest_size=HASH_BYTES, key=seed.to_bytes(8, "little"))

    def hashed(key: str) -> bytes:
        digest, data = begun.copy(), key.encode("utf-8", "surrogateescape")
        digest.update(data)
        return digest.digest() + data

    return hashed


def in_validation(key: str, selection: Selection) -> bool:
    """Whether a picture belongs to the validation set. Its name alone decides, so it stays there as the set grows."""
    return int.from_bytes(key_hash(selection.seed, f"val/{key}"), "big") < selection.val_fraction * 2**64


def plan_build(
    source: Source,
    listing: Listing,
    description: dict[str, Any],
    selection: Selection,
    recipe: Recipe,
    *,
    shard_bytes: int,
    shard_images: int | None,
) -> PlannedBuild:
    """Return the plan of a build. `description` is the source's kind and options."""
    pictures, digest = Items(), hashlib.sha256()
    chosen = select(listing, selection)
    while some := list(islice(chosen, CHUNK)):
        pictures.extend(some)
        digest.update("".join(map(_described, some)).encode())
    if shard_images is None:
        fit = max(1, int(0.95 * shard_bytes / _bytes_each(source, pictures, recipe, len(listing.labels))))
        shard_images = min(fit, max(MIN_IMAGES, -(-len(pictures) // WANTED_SHARDS)))
    plan = Plan(
        source={**description, **selection.model_dump(mode="json"), **recipe.model_dump()},
        labels={**listing.labels, **recipe.extra_labels},
        listing=digest.hexdigest(),
        pictures=len(pictures),
        groups=-(-len(pictures) // shard_images),
        shard_bytes=shard_bytes,
    )
    return PlannedBuild(plan, pictures)


def _described(item: Item) -> str:
    """Return a picture's name, labels, and its size if the listing has it, as the identity of a build counts them."""
    size = item.where if isinstance(item.where, int) else getattr(item.where, "bytes", 0)
    # As json.dumps writes it, in a third of the time: this is done for each picture of the listing.
    labels = ", ".join([str(label) if type(label) is int else _json(label) for label in item.labels])
    return f"[{_quote(item.key if item.key.isascii() else printable(item.key))}, [{labels}], {size}]"


def _bytes_each(source: Source, pictures: Items, recipe: Recipe, num_labels: int) -> float:
    """Return the estimated bytes of a picture in a shard, from the first PROBE_PICTURES in the order."""
    names = [str(i) for i in range(num_labels + len(recipe.extra_labels))]
    writer = ShardWriter("0" * 6, recipe.encoding, names, BuildOptions.shard_bytes)
    used = 0
    probed = pictures.slice(0, PROBE_PICTURES)
    with gathered(source, probed) as near:
        for item in probed:
            try:
                made = recipe.make(item, read_picture(near, item))
            except (BadImage, Skipped):
                continue
            used += 1
            for key, image, labels in made:
                writer.add(image, key, labels)
    if not writer.images:  # none is usable: the build will report that
        return recipe.frame.width * recipe.frame.height * recipe.channels + 4 * RECORD
    return max(1.0, writer.nbytes / used)


def _condition(text: str, labels: dict[str, LabelType]) -> Callable[[tuple[Any, ...]], bool]:
    """Return the test that `name=value` (or !=, <, <=, >, >=) means. Raises UsageError."""
    symbol = next((symbol for symbol in _OPERATORS if symbol in text), None)
    if symbol is None:
        raise UsageError(f"--where {text}: expected a condition such as male=1, class!=cat or yaw<10")
    name, _, wanted = (part.strip() for part in text.partition(symbol))
    if name not in labels:
        known = ", ".join(sorted(labels)) or "none"
        raise UsageError(f"--where {text}: there is no label {name!r}; the labels are: {known}")
    kind = labels[name]
    try:
        value = _boolean(wanted) if kind == "bool" else as_type(wanted, kind)
    except (ValueError, KeyError):
        raise UsageError(f"--where {text}: {wanted!r} is not of type {kind}, as the label {name} is") from None
    position, compare = list(labels).index(name), _OPERATORS[symbol]
    return lambda row: row[position] is not None and compare(row[position], value)


def _boolean(text: str) -> bool:
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
