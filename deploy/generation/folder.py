"""A generation as plain pictures: OUT/000000.png, OUT/000001.png, … and one manifest beside them.

    OUT/records/plan.json        the plan; every part writes the same one before its first picture
    OUT/records/made-1f2e3d.json what made pictures, one file for each different device and set of versions
    OUT/labels.csv               of a conditional model: file_name and the labels of every picture
    OUT/manifest.json            written last, when every picture is there; the records are then removed

A picture is written whole or not at all, so one that is there is finished: a command that is run again makes the rest.
"""

import csv
import io
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from deploy.generation.manifest import (
    AGAIN,
    MANIFEST,
    PLAN,
    RECORDS,
    Provenance,
    claim,
    read_manifest,
    read_plan,
)
from deploy.generation.pipeline import SampleStream, image_blocks, needed_blocks
from deploy.generation.plan import Plan, ShardRange
from pipeline.common.errors import DataError, TryAgainError
from pipeline.common.imaging import BadImage, Pixels, decode, encode
from pipeline.common.records import LARGEST, Record, read_record
from pipeline.common.storage import Store, sha256_bytes
from pipeline.data.dataset import DATASET_FILE

IN_FLIGHT = 256
"""Pictures that are encoded and written at the same time; more would only take memory."""
LABELS = "labels.csv"
_MADE = "made-"


class FolderManifest(Record):
    """The content of manifest.json beside plain pictures."""

    plan: Plan
    images: int = Field(ge=1, le=LARGEST)
    bytes: int = Field(ge=1)
    """Of all pictures together; 0 where a store does not say."""
    made_by: list[Provenance]


def picture_name(plan: Plan, index: int) -> str:
    """Return the file name of image `index`: at least six digits, as many for every image of the generation."""
    digits = max(6, len(str(plan.start + plan.count - 1)))
    return f"{index:0{digits}d}.{plan.format}"


def is_folder(store: Store) -> bool:
    """Whether a generation in `store`, finished or not, is one of plain pictures."""
    if (plan := read_plan(store)) is not None:
        return plan.layout == "folder"
    return store.exists(MANIFEST) and not store.exists(DATASET_FILE)


def begun(store: Store) -> Plan | None:
    """Return the plan of the generation in `store`, of shards or pictures, finished or not; None without one."""
    if (plan := read_plan(store)) is not None:  # first: one of shards has its manifest before it is finished
        return plan
    manifest = read_manifest(store) if store.exists(DATASET_FILE) else read_folder_manifest(store)
    return None if manifest is None else manifest.plan


def require_same_plan(store: Store, plan: Plan) -> None:
    """Raise TryAgainError if another part wrote another plan at the same moment as this one: the last one counts.

    Parts that begin at once on different processors may choose different backends.
    """
    if begun(store) != plan:
        raise TryAgainError(
            f"{store.path(PLAN)}: another part began at the same moment with another backend or block size; run the "
            "same command again: it takes those"
        )


def begin_folder(store: Store, plan: Plan) -> bool:
    """Claim the folder for `plan` and return whether all its pictures are finished already. Raises ConfigConflict."""
    return claim(store, plan, read_folder_manifest)


def read_folder_manifest(store: Store) -> FolderManifest | None:
    """Return the manifest of finished pictures, or None if they are not finished."""
    if not store.exists(MANIFEST):
        return None
    return read_record(FolderManifest, store.read(MANIFEST), store.path(MANIFEST), hint="a generation of shards?")


def unfinished_pictures(store: Store, plan: Plan, ranges: Sequence[ShardRange]) -> list[ShardRange]:
    """Return what is missing of `ranges` (ascending), as ranges: pictures that are there are not made again."""
    there, left = set(store.names()), list[ShardRange]()
    for index in (index for one in ranges for index in range(one.start, one.end)):
        if picture_name(plan, index) in there:
            continue
        if left and left[-1].end == index:
            left[-1] = ShardRange(left[-1].start, index + 1)
        else:
            left.append(ShardRange(index, index + 1))
    return left


def generate_pictures(
    sampler: SampleStream,
    plan: Plan,
    ranges: Sequence[ShardRange],
    store: Store,
    provenance: Provenance,
    *,
    given: NDArray[np.float32] | None,
    threads: int,
    stop: threading.Event,
    report_images: Callable[[int], None] = lambda images: None,
) -> int:
    """Make the images of `ranges` (ascending) and write each as a file; return how many.

    Once `stop` is set, those in flight are written, and no more are made.
    """
    if not ranges:
        return 0
    record = (provenance.model_dump_json() + "\n").encode()
    store.write(f"{RECORDS}/{_MADE}{sha256_bytes(record)[:12]}.json", record)
    options = {} if plan.quality is None else {"quality": plan.quality}
    done = 0
    writing: deque[Future[None]] = deque()

    def write(index: int, image: Pixels) -> None:
        store.write(picture_name(plan, index), encode(image, plan.file_format, **options))

    with ThreadPoolExecutor(threads, "writer") as pool:
        for index, image in _images(sampler, plan, ranges, given):
            if stop.is_set():
                break
            writing.append(pool.submit(write, index, image))
            while len(writing) >= IN_FLIGHT or (writing and writing[0].done()):
                writing.popleft().result()
                done += 1
                report_images(1)
        for future in writing:
            future.result()
            done += 1
            report_images(1)
    return done


def _images(
    sampler: SampleStream, plan: Plan, ranges: Sequence[ShardRange], given: NDArray[np.float32] | None
) -> Iterator[tuple[int, Pixels]]:
    """Yield (index, image (H, W, C)) for every image of `ranges`."""
    firsts = [block * plan.block_images for block in needed_blocks(ranges, plan.block_images)]
    blocks = image_blocks(sampler, plan, firsts, given)
    wanted = iter(ranges)
    current = next(wanted)
    for first, images in zip(firsts, blocks, strict=True):
        for index, image in enumerate(images, start=first):
            if index >= current.end and (following := next(wanted, None)) is not None:
                current = following
            if current.start <= index < current.end:
                yield index, image


def merge_folder(store: Store, *, verify: bool = False, tidy: bool = False) -> FolderManifest:
    """Write manifest.json when every picture is there. Safe to repeat.

    `verify` decodes every picture, and deletes those that it cannot. `tidy` removes the records. Raises TryAgainError
    while pictures are missing, DataError when some were damaged.
    """
    plan = read_plan(store)
    manifest = read_folder_manifest(store)
    plan = manifest.plan if manifest else plan
    if plan is None:
        raise DataError(f"{store.location}: holds no generation; expected the --out of dcgan-generate")
    sizes = store.sizes()
    names = [picture_name(plan, index) for index in range(plan.start, plan.start + plan.count)]
    missing = [name for name in names if name not in sizes]
    if verify and not missing:
        missing = [name for name in names if not _sound(store, plan, name)]
        for name in missing:
            store.delete(name)
    if missing:
        store.write(PLAN, (plan.model_dump_json(indent=1) + "\n").encode())
        if manifest is not None:
            store.delete(MANIFEST)
        kind = DataError if manifest is not None or (verify and not set(missing) - set(sizes)) else TryAgainError
        raise kind(f"{store.path(missing[0])}: missing or damaged, and {len(missing) - 1:,} others; {AGAIN}")
    if manifest is None:
        records = [name for name in store.names(RECORDS) if name.startswith(_MADE)]
        made_by = [
            read_record(Provenance, store.read(f"{RECORDS}/{name}"), store.path(name), hint="of another version?")
            for name in records
        ]
        if plan.labels is not None:
            store.write(LABELS, _table(plan, names))
        total = sum(sizes[name] or 0 for name in names)
        manifest = FolderManifest(plan=plan, images=plan.count, bytes=max(1, total), made_by=made_by)
        store.write(MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
    if tidy:
        store.delete(RECORDS)
    return manifest


def _table(plan: Plan, names: Sequence[str]) -> bytes:
    """Return the labels of pictures as a CSV, which `dcgan-data build folder --labels` reads."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file_name", *plan.label_types])
    for name, row in zip(names, plan.label_values(plan.start, plan.count), strict=True):
        table.writerow([name, *(str(value).lower() if isinstance(value, bool) else value for value in row)])
    return text.getvalue().encode()


def _sound(store: Store, plan: Plan, name: str) -> bool:
    try:
        return decode(store.read(name), plan.channels).shape == plan.image_shape
    except (BadImage, DataError):
        return False
