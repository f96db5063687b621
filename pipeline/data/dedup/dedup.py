"""`dcgan-data dedup`: finds near-duplicates by the paper's semantic hash, and keeps the first of each group."""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import Pixels, decode, encode, labeled_sheet
from pipeline.common.progress import Progress
from pipeline.common.storage import Store, atomic_path, is_url, require_writable
from pipeline.data.build import builder, state
from pipeline.data.build.options import BuildOptions
from pipeline.data.build.plan import Selection, plan_build
from pipeline.data.build.transform import Recipe
from pipeline.data.dataset import DATASET_FILE, Dataset, open_dataset
from pipeline.data.dedup.hamming import close_pairs
from pipeline.data.dedup.hash_recall import RADII, measure
from pipeline.data.dedup.semantic_hash import BITS, Codes, SemanticHash
from pipeline.data.shard_reader import iterate
from pipeline.data.sources.interface import Item, Items, Listing
from pipeline.data.sources.tars import Tars, list_dataset

TRAIN_BYTES = 256_000_000
"""Bytes of pixels that the hash learns from: those of the first images, which are in random order."""
SHOWN_GROUPS = 60
SHEET_COLUMNS = 5
REPORT, SHEET, TABLE = state.DUPLICATES_REPORT, state.DUPLICATES_SHEET, state.DUPLICATES_TABLE


@dataclass(frozen=True)
class Duplicates:
    """For each image, the index of the image kept for it (its own if it is kept), and their distance in bits."""

    kept_by: NDArray[np.int64]
    distance: NDArray[np.int64]

    @property
    def keep(self) -> NDArray[np.bool_]:
        """Which images are kept."""
        return np.asarray(self.kept_by == np.arange(len(self.kept_by)))


def keep_first(codes: Codes, radius: int) -> Duplicates:
    """Return which images are kept: in order, each image that differs from every kept one in more than `radius` bits.

    An image is dropped only for a kept one within the radius, so a chain of neighbors does not drop distinct images.
    It is dropped for the nearest of those that were kept before the first image with its code.
    """
    unique, first, group = np.unique(codes, axis=0, return_index=True, return_inverse=True)
    pairs = close_pairs(unique, radius)
    # In the order of each code's first image; a pair's later code can only be dropped for its earlier one.
    early, late = first[pairs[:, 0]], first[pairs[:, 1]]
    early, late = np.minimum(early, late), np.maximum(early, late)
    order = np.lexsort((early, pairs[:, 2], late))
    kept_by, distance = np.arange(len(codes)), np.zeros(len(codes), np.int64)
    dropped = bytearray(len(codes))  # in a loop much faster than an array
    for a, b, apart in zip(early[order].tolist(), late[order].tolist(), pairs[order, 2].tolist(), strict=True):
        if not dropped[a] and not dropped[b]:
            dropped[b] = True
            kept_by[b], distance[b] = a, apart
    same = first[group.ravel()]  # the first image with the same code
    return Duplicates(kept_by[same], distance[same])


def dedup(dataset: Dataset, out: str, *, radius: int, seed: int, workers: int, overwrite: bool) -> Dataset:
    """Copy `dataset` to `out` without near-duplicates, and write a report. Raises UserError.

    `out` must not be the data set's own folder: see `refuse_overlap`.
    """
    if dataset.encoding == "tar":
        raise UsageError(
            f"{dataset.location}: is an index of tars; copy the images first: "
            f"dcgan-data build webdataset {dataset.source.get('spec')} …"
        )
    state.refuse_overlap(dataset.location, out)
    state.refuse_foreign(out)
    description = {"kind": "dedup", "of": dataset.fingerprint(), "radius": radius, "hash_seed": seed}
    if not overwrite and (finished := _finished(Store(out), description)):
        print(f"{out}: already de-duplicated with these options, nothing to do", file=sys.stderr)
        return finished
    require_writable(out)
    source = Tars(dataset.location)
    listing = list_dataset(dataset)
    items = list(listing.items)
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        kept_in = Path(temporary) if is_url(out) else Path(out) / Store(out).inside(state.STATE_FOLDER)
        semantic_hash, codes = _codes(dataset, seed, kept_in, times)
    began = time.monotonic()
    found = keep_first(codes, radius)
    times["neighbors"] = time.monotonic() - began
    kept = [item for item, keep in zip(items, found.keep, strict=True) if keep]
    recipe = _recipe(dataset)
    planned = plan_build(
        source,
        Listing(listing.labels, Items(kept)),
        description,
        Selection(seed=_recorded(dataset, "seed", 0, 1 << 64)),
        recipe,
        shard_bytes=max(BuildOptions.shard_bytes, int(dataset.shards.bytes.max())),
        shard_images=None,
    )
    state.prepare(out, planned.plan, overwrite=overwrite)
    _write_report(Store(out), source, items, found, semantic_hash, radius, times)
    result = builder.run(
        source,
        Listing({}),
        planned,
        recipe,
        location=dataset.location,
        out=out,
        workers=workers,
        max_bad=0.0,
    )
    assert result is not None
    return result


def _finished(store: Store, description: dict[str, object]) -> Dataset | None:
    """Return the data set in `store`, or None if there is none. Raises ConfigConflict for another, or its build."""
    if store.exists(DATASET_FILE):
        dataset = open_dataset(store)
        there = state.built_as(dataset)
    elif store.exists(state.STATE_FILE):
        dataset, there = None, state.identity(state.read_state(store).plan)
    else:
        return None
    state.compare(description, {key: there.get(key) for key in description}, store.location)
    return dataset


def _recorded(dataset: Dataset, name: str, default: int, end: int) -> int:
    """Return a number that dataset.json records of the build, from 0 to `end` - 1. Raises DataError."""
    value = dataset.source.get(name, default)
    if type(value) is not int or not 0 <= value < end:
        raise DataError(f"{dataset.store.path(DATASET_FILE)}: source.{name} is {value!r}; expected a number")
    return value


def _recipe(dataset: Dataset) -> Recipe:
    """Return the recipe that keeps the data set's images byte for byte."""
    assert dataset.encoding != "tar"
    quality = _recorded(dataset, "quality", 100, 101)
    return Recipe(
        size=dataset.image_size,
        channels=dataset.channels,
        encoding=dataset.encoding,
        quality=quality,
        min_side=BuildOptions.min_side,
    )


def _codes(dataset: Dataset, seed: int, folder: Path, times: dict[str, float]) -> tuple[SemanticHash, Codes]:
    """Train the hash and hash all images, or read from `folder` what a killed run has already done."""
    weights, coded = folder / "hash.safetensors", folder / "codes.npy"
    marker = folder / "hash-of.txt"
    identity = f"{dataset.fingerprint()} {seed}"
    if (kept := _kept_codes(marker, weights, coded, identity, dataset.images)) is not None:
        return kept
    semantic_hash = SemanticHash(seed=seed)
    began = time.monotonic()
    sample: list[Pixels] = []
    for images in iterate(dataset):
        sample.append(images)
        if sum(images.nbytes for images in sample) >= TRAIN_BYTES:
            break
    with Progress("learning the hash", semantic_hash.steps, "steps") as progress:
        semantic_hash.fit(np.concatenate(sample), progress=progress)
    times["training"] = time.monotonic() - began
    began = time.monotonic()
    codes = []
    with Progress("hashing", dataset.images) as progress:
        for images in iterate(dataset, batch=1024):
            codes.append(semantic_hash.codes(images))
            progress.advance(len(images))
    times["hashing"] = time.monotonic() - began
    all_codes = np.concatenate(codes)
    folder.mkdir(parents=True, exist_ok=True)
    semantic_hash.save(weights)
    with atomic_path(coded) as path, path.open("wb") as file:
        np.save(file, all_codes)
    with atomic_path(marker) as path:
        path.write_text(identity)
    return semantic_hash, all_codes


def _kept_codes(
    marker: Path, weights: Path, coded: Path, identity: str, images: int
) -> tuple[SemanticHash, Codes] | None:
    """Return what a killed run kept of the same work; None if there is nothing, or it cannot be used."""
    try:
        if marker.read_bytes() != identity.encode():
            return None
        codes = np.load(coded, allow_pickle=False)
        semantic_hash = SemanticHash.load(weights)
    except Exception:  # numpy reads a header as Python, and raises whatever that does at damaged bytes
        return None
    whole = isinstance(codes, np.ndarray) and codes.dtype == np.uint8 and codes.shape == (images, BITS // 8)
    return (semantic_hash, codes) if whole else None


def _write_report(
    store: Store,
    source: Tars,
    items: list[Item],
    found: Duplicates,
    semantic_hash: SemanticHash,
    radius: int,
    times: dict[str, float],
) -> None:
    """Write which image was dropped for which, the measurements and a sheet of groups; print a summary."""
    dropped = np.flatnonzero(~found.keep)
    lines = [f"{items[i].key}\t{items[found.kept_by[i]].key}\t{found.distance[i]}\n" for i in dropped]
    store.write(TABLE, ("dropped\tkept\tdistance\n" + "".join(lines)).encode())
    kept = np.flatnonzero(found.keep)[:1000]
    report = {
        "images": len(items),
        "kept": int(found.keep.sum()),
        "dropped": len(dropped),
        "groups": len(np.unique(found.kept_by[dropped])),
        "radius": radius,
        "radii": list(RADII),
        **measure(semantic_hash, np.stack([_pixels(source, items[i]) for i in kept])),
        "seconds": {name: round(value, 2) for name, value in times.items()},
    }
    store.write(REPORT, (json.dumps(report, indent=1) + "\n").encode())
    if len(dropped):
        store.write(SHEET, encode(_sheet(source, items, found, dropped), "png"))
    print(
        f"{len(dropped):,} of {len(items):,} images dropped ({len(dropped) / len(items):.2%}) at radius {radius}; "
        f"see {store.path(REPORT)}, {TABLE}" + (f" and {SHEET}" if len(dropped) else ""),
        file=sys.stderr,
    )


def _sheet(source: Tars, items: list[Item], found: Duplicates, dropped: NDArray[np.int64]) -> Pixels:
    """Return a picture of the groups, the largest distance first: the kept image, then those dropped for it."""
    ordered = dropped[np.argsort(found.kept_by[dropped], kind="stable")]
    kept, starts = np.unique(found.kept_by[ordered], return_index=True)
    ends = np.append(starts[1:], len(ordered))
    farthest = np.maximum.reduceat(found.distance[ordered], starts)
    rows = []
    for group in np.argsort(-farthest, kind="stable")[:SHOWN_GROUPS]:
        members = ordered[starts[group] : ends[group]]
        shown = members[:7]
        caption = f"{len(members)} dropped, {', '.join(str(found.distance[i]) for i in shown)} bits"
        rows.append((caption, np.stack([_pixels(source, items[i]) for i in (kept[group], *shown)])))
    sheets = [labeled_sheet(rows[start::SHEET_COLUMNS]) for start in range(min(SHEET_COLUMNS, len(rows)))]
    height = max(sheet.shape[0] for sheet in sheets)
    return np.concatenate(
        [np.pad(sheet, ((0, height - len(sheet)), (0, 12), (0, 0)), constant_values=255) for sheet in sheets], axis=1
    )


def _pixels(source: Tars, item: Item) -> Pixels:
    """Return an image of one of our data sets."""
    picture = source.read(item)
    return picture if isinstance(picture, np.ndarray) else decode(picture)
