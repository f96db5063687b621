"""The plan of a build, made before the images are decoded: the order, the groups of images, the identity.

A group is a fixed range of the ordered listing, and becomes one shard. Its bytes do not depend on other groups, so
groups can be built in any order, by any process, on any machine, and again after a kill.
"""

import hashlib
import json
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import BadImage
from pipeline.common.records import LARGEST, Record
from pipeline.data.build.options import BuildOptions
from pipeline.data.build.transform import Recipe, Skipped
from pipeline.data.dataset import LabelType
from pipeline.data.shard_writer import RECORD, ShardWriter
from pipeline.data.sources.interface import KEY, Item, Listing, Source, as_type, printable, read_picture

PROBE_PICTURES = 64
"""Pictures that are encoded beforehand, to estimate how many fill a shard."""
WANTED_SHARDS = 16
"""Shards of a small set, so that all cores have work. A shard has at least MIN_IMAGES pictures, though."""
MIN_IMAGES = 256

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
    items: list[Item]

    def group(self, index: int) -> list[Item]:
        """Return the pictures of a group: contiguous, and group sizes differ by at most one."""
        total, groups = len(self.items), self.plan.groups
        return self.items[total * index // groups : total * (index + 1) // groups]


def select(listing: Listing, selection: Selection) -> list[Item]:
    """Return the chosen pictures in their final order. Raises UserError when none is left."""
    if KEY in listing.labels:
        raise DataError(f"a label is named {KEY!r}, which is reserved for the image's name; rename the column")
    tests = [_condition(text, listing.labels) for text in selection.where]
    items = [item for item in listing.items if all(test(item.labels) for test in tests)]
    if not items:
        raise UsageError(f"--where {' '.join(selection.where)}: none of {len(listing.items):,} pictures matches")
    items.sort(key=lambda item: key_hash(selection.seed, item.key))
    items = items[: selection.limit]
    if selection.split != "all":
        wanted = selection.split == "val"
        items = [item for item in items if in_validation(item.key, selection) is wanted]
        if not items:
            raise UsageError(f"--val-fraction {selection.val_fraction}: the {selection.split} set would be empty")
    return items


def key_hash(seed: int, key: str) -> bytes:
    """Return the 8 bytes by which images are ordered: uniform, and the same on every machine."""
    return hashlib.blake2b(
        key.encode("utf-8", "surrogateescape"), digest_size=8, key=seed.to_bytes(8, "little")
    ).digest()


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
    items = select(listing, selection)
    if shard_images is None:
        fit = max(1, int(0.95 * shard_bytes / _bytes_each(source, items, recipe, len(listing.labels))))
        shard_images = min(fit, max(MIN_IMAGES, -(-len(items) // WANTED_SHARDS)))
    plan = Plan(
        source={**description, **selection.model_dump(mode="json"), **recipe.model_dump()},
        labels={**listing.labels, **recipe.extra_labels},
        listing=_digest(items),
        pictures=len(items),
        groups=-(-len(items) // shard_images),
        shard_bytes=shard_bytes,
    )
    return PlannedBuild(plan, items)


def _digest(items: list[Item]) -> str:
    """Return a SHA-256 over the pictures' names and labels, and their sizes if the listing has them."""
    digest = hashlib.sha256()
    for item in items:
        size = item.where if isinstance(item.where, int) else 0
        digest.update(json.dumps([printable(item.key), item.labels, size]).encode())
    return digest.hexdigest()


def _bytes_each(source: Source, items: list[Item], recipe: Recipe, num_labels: int) -> float:
    """Return the estimated bytes of a picture in a shard, from the first PROBE_PICTURES in the order."""
    names = [str(i) for i in range(num_labels + len(recipe.extra_labels))]
    writer = ShardWriter("0" * 6, recipe.encoding, names, BuildOptions.shard_bytes)
    pictures = 0
    for item in items[:PROBE_PICTURES]:
        try:
            made = recipe.make(item, read_picture(source, item))
        except (BadImage, Skipped):
            continue
        pictures += 1
        for key, image, labels in made:
            writer.add(image, key, labels)
    if not writer.images:  # none is usable: the build will report that
        return recipe.size**2 * recipe.channels + 4 * RECORD
    return max(1.0, writer.nbytes / pictures)


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
