"""The files of a generation: a record of each finished shard, and the manifest and data set that they merge into.

    OUT/records/plan.json                 the plan; every part writes the same one before its first shard
    OUT/records/000000004096.json         the record of one finished shard, written after the shard
    OUT/samples-000000004096-1f2e3d.tar   a shard; its name holds the start of its SHA-256
    OUT/manifest.json, OUT/dataset.json   written last, when every shard is finished

A shard's name follows from its content, so two writers of one shard never overwrite each other's work: either
their bytes are equal, or their names differ and the record decides which of the two counts.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from pydantic import BaseModel, Field

from deploy.generation.plan import Plan, ShardRange
from pipeline.common.errors import ConfigConflict, DataError, TryAgainError
from pipeline.common.records import LARGEST, PlainName, Record, read_record
from pipeline.common.storage import Store, sha256_bytes
from pipeline.data.commit import require_recorded
from pipeline.data.dataset import DATASET_FILE, Dataset, Shard, open_dataset, write_dataset
from pipeline.data.shard_table import TABLE_FILE, ShardTable
from pipeline.data.shard_writer import ShardWriter

MANIFEST = "manifest.json"
RECORDS = "records"
PLAN = f"{RECORDS}/plan.json"
PREFIX = "samples-"
READERS = 16
READ_AHEAD = 4 * READERS
"""Records that are read at once."""
_OURS = re.compile(rf"\.?{PREFIX}[0-9]{{12,}}-[0-9a-f]{{12}}\.tar(\..*)?")  # a shard, or one half written
AGAIN = "run dcgan-generate again with the same options: it makes these again and keeps the rest"

T = TypeVar("T", bound=Record)


class Provenance(Record):
    """What made a shard. Shards of one generation may differ in it; their images then differ by 1 LSB at most."""

    device: str
    provider: str
    processor: str = ""
    """Name of the CPU; '' in records of an earlier version."""
    versions: dict[str, str]
    """Versions of the packages that the process had imported: those that sampled and encoded, and no others."""


class FinishedShard(Record):
    """The record of a finished shard."""

    plan_sha256: str
    start: int = Field(ge=0, le=LARGEST)
    """Index of its first image."""
    shard: Shard
    made_by: Provenance


class ManifestShard(Record):
    """A shard in the manifest. dataset.json says where its images lie inside."""

    name: PlainName
    start: int = Field(ge=0, le=LARGEST)
    images: int = Field(ge=1, le=LARGEST)
    bytes: int = Field(ge=1, le=LARGEST)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    made_by: int = Field(ge=0)
    """Index into the manifest's `made_by`."""


class Manifest(Record):
    """The content of manifest.json: what made every image of a finished generation."""

    plan: Plan
    images: int = Field(ge=1, le=LARGEST)
    bytes: int = Field(ge=1)
    made_by: list[Provenance]
    shards: list[ManifestShard]


def record_name(shard: ShardRange) -> str:
    """Return the name of a shard's record."""
    return f"{RECORDS}/{shard.prefix}.json"


def shard_name(shard: ShardRange, sha256: str) -> str:
    """Return the file name of a shard with this content."""
    return f"{PREFIX}{shard.prefix}-{sha256[:12]}.tar"


def start_of(name: str) -> int | None:
    """Return the index of the first image of the shard `name`, or None if no generation names a file so."""
    match = re.fullmatch(rf"{PREFIX}([0-9]{{12,}})-[0-9a-f]{{12}}\.tar", name)
    return int(match[1]) if match else None


def begin(store: Store, plan: Plan) -> bool:
    """Claim the folder for `plan`, of shards, and return whether the generation is finished already. As `claim`."""
    return claim(store, plan, read_manifest)


def claim(store: Store, plan: Plan, read: Callable[[Store], Any]) -> bool:
    """Write `plan` into a folder without one, and return whether the generation is finished already.

    `read` returns the manifest of a finished one, or None. Removes files that killed writers left half-written. Raises
    ConfigConflict when the folder holds another generation, with the difference, or another data set.
    """
    # In this order, as another writer may finish the generation while we look: it writes the plan first and the data
    # set last, and only then removes the plan.
    holds_dataset = store.exists(DATASET_FILE)
    begun = read_plan(store)
    finished = read(store)
    found = begun if finished is None else finished.plan
    if found is None:
        if holds_dataset:
            raise ConfigConflict(f"{store.path(DATASET_FILE)}: --out already holds a data set; choose an empty folder")
        if store.exists(MANIFEST):
            raise ConfigConflict(f"{store.path(MANIFEST)}: --out already holds a generation; choose an empty folder")
        store.write(PLAN, _json(plan, 1))
    elif found != plan:
        ours, theirs = _flat(plan), _flat(found)
        keys = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
        difference = ", ".join(f"{key} {theirs.get(key)} != {ours.get(key)}" for key in keys)
        raise ConfigConflict(
            f"{store.location}: holds another generation ({difference}); use the same options, or choose another --out"
        )
    for folder in ("", RECORDS):
        store.remove_abandoned(folder)
    return finished is not None


def _flat(plan: Plan) -> dict[str, Any]:
    """Return the fields of a plan, with those of its labels beside them; the classes are the model's."""
    values = plan.model_dump()
    labels = {key: value for key, value in (values.pop("labels", None) or {}).items() if key in ("draw", "chosen")}
    return values | {f"labels.{key}": ",".join(value) if key == "chosen" else value for key, value in labels.items()}


def read_plan(store: Store) -> Plan | None:
    """Return the plan of an unfinished generation, or None if there is none."""
    if not store.exists(PLAN):
        return None
    try:
        return _read(store, PLAN, Plan)
    except DataError:
        if store.exists(PLAN):
            raise
        return None  # removed meanwhile: it is finished


def read_manifest(store: Store) -> Manifest | None:
    """Return the manifest of a finished generation, or None if it is not finished."""
    return _read(store, MANIFEST, Manifest) if store.exists(MANIFEST) and store.exists(DATASET_FILE) else None


def finish_shard(
    store: Store, plan: Plan, shard: ShardRange, writer: ShardWriter, provenance: Provenance
) -> FinishedShard:
    """Write a shard, then its record. It is safe to repeat this, and for two writers to do it at once."""
    data, written = writer.finish("unnamed.tar")
    written = written.model_copy(update={"name": shard_name(shard, written.sha256)})
    store.write(written.name, data)
    record = FinishedShard(plan_sha256=plan.sha256(), start=shard.start, shard=written, made_by=provenance)
    store.write(record_name(shard), _json(record))
    return record


def unfinished(store: Store, plan: Plan, shards: Iterable[ShardRange]) -> list[ShardRange]:
    """Return those of `shards` that have no record, or whose file differs from its record."""
    present = set(store.names(RECORDS))

    def finished(shard: ShardRange) -> bool:
        if f"{shard.prefix}.json" not in present:
            return False
        try:
            return _intact(store, _read_finished(store, plan, shard).shard)
        except DataError:
            return False

    shards = list(shards)
    with ThreadPoolExecutor(READERS) as pool:
        return [shard for shard, done in zip(shards, pool.map(finished, shards), strict=True) if not done]


def missing(store: Store, plan: Plan) -> tuple[int, ShardRange | None]:
    """Return how many shards have no record yet, and the first of them. Lists names only; reads no shard."""
    present = {name for name in store.names(RECORDS) if re.fullmatch(r"[0-9]{12,}\.json", name)}
    # A plan may name more shards than a memory holds, so none is listed that follows the first gap.
    first = next((shard for shard in plan.iterate_shards() if f"{shard.prefix}.json" not in present), None)
    return plan.num_shards - len(present), first


def merge(store: Store, *, verify: bool = False, tidy: bool = False) -> Manifest:
    """Merge all parts into one data set: write manifest.json, then dataset.json.

    `verify` reads every shard and compares its SHA-256. `tidy` removes the records and stray shards, which is safe
    only when no part runs any more. It is safe to repeat a merge, and for two processes to merge at once.

    Raises TryAgainError while shards are missing; DataError when one belongs to another generation or is damaged, and
    when a listing of the folder shows other shards than the records.
    """
    manifest = read_manifest(store)
    if manifest is not None:
        dataset = open_dataset(store)
        _check_agreement(store, manifest, dataset)
    else:
        plan = read_plan(store)
        if plan is None:
            raise DataError(f"{store.location}: holds no generation; expected the --out of dcgan-generate")
        lacking, first = missing(store, plan)
        if first is not None:
            raise TryAgainError(
                f"{store.location}: {lacking} of {plan.num_shards} shards are missing, the first with "
                f"images {first.start} to {first.end - 1}; wait for every part, or run it again"
            )
        manifest, dataset = _assemble(store, plan)
    if verify:
        _verify(manifest, dataset)
    starts = {shard.start for shard in manifest.shards}
    require_recorded(
        store,
        dataset.shards,
        forget=lambda names: reopen(manifest, dataset, names),
        spare=lambda name: start_of(name) in starts,  # what another writer of the same shard left
        advice=AGAIN,
    )
    store.write(MANIFEST, _json(manifest, 1))
    write_dataset(dataset)
    if tidy:
        _tidy(store, manifest)
    return manifest


def _read_finished(store: Store, plan: Plan, shard: ShardRange) -> FinishedShard:
    """Return the record of a shard. Raises DataError unless it says of this shard what `finish_shard` writes."""
    record = _read(store, record_name(shard), FinishedShard)
    stated = (record.plan_sha256, record.start, record.shard.images, record.shard.name)
    if stated != (plan.sha256(), shard.start, shard.images, shard_name(shard, record.shard.sha256)):
        raise DataError(
            f"{store.path(record_name(shard))}: belongs to another generation (another model or range); "
            "delete it and run its part again"
        )
    if len(record.shard.offsets) != len(record.shard.sizes):
        raise DataError(f"{store.path(record_name(shard))}: damaged; delete it and run its part again")
    return record


def _read_all_finished(store: Store, plan: Plan) -> Iterator[FinishedShard]:
    """Yield the records of all shards in their order; few are in memory at a time."""
    planned = iter(plan.iterate_shards())
    with ThreadPoolExecutor(READERS) as pool:
        while some := list(islice(planned, READ_AHEAD)):
            yield from pool.map(lambda shard: _read_finished(store, plan, shard), some)


def _check_agreement(store: Store, manifest: Manifest, dataset: Dataset) -> None:
    """Raise DataError unless the manifest and dataset.json state the same shards, which are those of the plan."""
    found = [(shard.name, shard.images, shard.bytes, shard.sha256) for shard in manifest.shards]
    stated = [(shard.name, shard.images, shard.bytes, shard.sha256) for shard in dataset.shards]
    planned = (range_.start for range_ in manifest.plan.iterate_shards())
    agree = found == stated and len(found) == manifest.plan.num_shards
    if not agree or any(shard.start != start for shard, start in zip(manifest.shards, planned, strict=True)):
        raise DataError(f"{store.path(MANIFEST)}: names other shards than {DATASET_FILE}; generate into another folder")
    if any(shard.made_by >= len(manifest.made_by) for shard in manifest.shards):
        raise DataError(f"{store.path(MANIFEST)}: does not say what made its shards; generate into another folder")


def _assemble(store: Store, plan: Plan) -> tuple[Manifest, Dataset]:
    """Return the manifest and the data set that the records add up to.

    The places of images become columns as they are read: 16 bytes an image, where records would hold a hundred.
    """
    made_by: dict[str, int] = {}
    shards: list[ManifestShard] = []

    def stored() -> Iterator[Shard]:
        for record in _read_all_finished(store, plan):
            shard = record.shard
            stated = {"name": shard.name, "images": shard.images, "bytes": shard.bytes, "sha256": shard.sha256}
            made = made_by.setdefault(record.made_by.model_dump_json(), len(made_by))
            shards.append(ManifestShard(**stated, start=record.start, made_by=made))
            yield shard

    table = ShardTable.of(stored())
    total = sum(shard.bytes for shard in shards)
    manifest = Manifest(
        plan=plan,
        images=plan.count,
        bytes=total,
        made_by=[Provenance.model_validate_json(provenance) for provenance in made_by],
        shards=shards,
    )
    dataset = Dataset(
        image_size=plan.image_size,
        channels=plan.channels,
        encoding=plan.format,
        labels=plan.label_types,
        source={"kind": "generated", **plan.model_dump()},
        images=plan.count,
        bytes=total,
        shards=table,
    ).at(store)
    return manifest, dataset


def _verify(manifest: Manifest, dataset: Dataset) -> None:
    """Read every shard. If one is missing or damaged, make the generation unfinished again and raise DataError."""
    store = dataset.store
    with ThreadPoolExecutor(READERS) as pool:
        intact = list(pool.map(lambda shard: _intact(store, shard), manifest.shards))
    if damaged := [shard.name for shard, good in zip(manifest.shards, intact, strict=True) if not good]:
        reopen(manifest, dataset, set(damaged))
        raise DataError(f"{store.path(damaged[0])}: missing or damaged, and {len(damaged) - 1} others; {AGAIN}")


def reopen(manifest: Manifest, dataset: Dataset, lost: set[str]) -> None:
    """Make the generation unfinished, with the records of all shards but those that are `lost`."""
    store = dataset.store
    store.write(PLAN, _json(manifest.plan, 1))
    for shard, stored in zip(manifest.shards, dataset.shards, strict=True):
        name = f"{RECORDS}/{shard.start:012d}.json"
        if shard.name not in lost:
            provenance = manifest.made_by[shard.made_by]
            record = FinishedShard(
                plan_sha256=manifest.plan.sha256(), start=shard.start, shard=stored, made_by=provenance
            )
            store.write(name, _json(record))
        else:
            store.delete(name)
    store.delete(DATASET_FILE)
    store.delete(TABLE_FILE)
    store.delete(MANIFEST)


def _intact(store: Store, shard: Shard | ManifestShard) -> bool:
    try:
        data = store.read(store.inside(shard.name))
    except DataError:
        return False
    return len(data) == shard.bytes and sha256_bytes(data) == shard.sha256


def _tidy(store: Store, manifest: Manifest) -> None:
    """Remove the records, and the shards that the manifest does not name: a killed part left them."""
    wanted = {shard.name for shard in manifest.shards}
    for name in store.names():
        if _OURS.fullmatch(name) and name not in wanted:
            store.delete(name)
    store.delete(RECORDS)


def _json(value: BaseModel, indent: int | None = None) -> bytes:
    return (value.model_dump_json(indent=indent) + "\n").encode()


def _read(store: Store, name: str, kind: type[T]) -> T:
    return read_record(kind, store.read(name), store.path(name), hint="written by another version?")
