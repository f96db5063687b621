"""What is finished of a generation, and the merging of its parts into one data set with a manifest.

    OUT/records/plan.json                 what is being made; written first, the same by every part
    OUT/records/000000004096.json         one for each finished shard, written after it
    OUT/samples-000000004096-1f2e3d.tar   the shards; the name holds their SHA-256
    OUT/manifest.json, OUT/dataset.json   written when all is there, last

A shard's name follows from its content, so two writers of the same shard never overwrite each other's
work: their bytes are equal, or their names differ and the record decides which of the two counts.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from deploy.generation.plan import Plan, ShardRange
from pipeline.common.errors import ConfigConflict, DataError, TryAgainError
from pipeline.common.storage import Store, sha256_bytes
from pipeline.data.dataset import DATASET_FILE, Dataset, Shard, open_dataset
from pipeline.data.shard_writer import ShardWriter

MANIFEST = "manifest.json"
RECORDS = "records"
PLAN = f"{RECORDS}/plan.json"
PREFIX = "samples-"
READERS = 16

Model = TypeVar("Model", bound=BaseModel)


class Entry(BaseModel):
    """A part of the manifest or of a record."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Maker(Entry):
    """What made a shard. Machines may differ: then their images differ by 1 LSB at most."""

    device: str
    provider: str
    versions: dict[str, str]
    """Of the packages that sampled and encoded."""


class Record(Entry):
    """A finished shard."""

    plan_sha256: str
    start: int
    """Index of its first image."""
    shard: Shard
    made_by: Maker


class ManifestShard(Entry):
    """A shard in the manifest. Where its images lie inside is in dataset.json."""

    name: str
    start: int
    images: int
    bytes: int
    sha256: str
    made_by: int
    """Position in the manifest's `made_by`."""


class Manifest(Entry):
    """The content of manifest.json: where every image of a finished generation came from."""

    plan: Plan
    images: int
    bytes: int
    made_by: list[Maker]
    shards: list[ManifestShard]


def record_name(shard: ShardRange) -> str:
    """Return the name of a shard's record."""
    return f"{RECORDS}/{shard.prefix}.json"


def begin(store: Store, plan: Plan) -> bool:
    """Claim the folder for `plan` and return whether the generation is finished already.

    What killed writers left half-written is removed. Raises ConfigConflict, with the difference, when another
    generation lives there.
    """
    manifest = read_manifest(store)
    found = manifest.plan if manifest else read_plan(store)
    if found is None:
        if store.exists(DATASET_FILE):
            raise ConfigConflict(f"{store.path(DATASET_FILE)}: --out already holds a data set; choose an empty folder")
        store.write(PLAN, _json(plan, 1))
    elif found != plan:
        ours, theirs = plan.model_dump(), found.model_dump()
        difference = ", ".join(f"{key} {theirs[key]} != {ours[key]}" for key in ours if ours[key] != theirs[key])
        raise ConfigConflict(
            f"{store.location}: holds another generation ({difference}); repeat its options, or choose another --out"
        )
    for folder in ("", RECORDS):
        store.remove_abandoned(folder)
    return manifest is not None


def read_plan(store: Store) -> Plan | None:
    """Return the plan of an unfinished generation, or None if there is none."""
    return _read(store, PLAN, Plan) if store.exists(PLAN) else None


def read_manifest(store: Store) -> Manifest | None:
    """Return the manifest of a finished generation, or None if it is not finished."""
    return _read(store, MANIFEST, Manifest) if store.exists(MANIFEST) and store.exists(DATASET_FILE) else None


def finish_shard(store: Store, plan: Plan, shard: ShardRange, writer: ShardWriter, maker: Maker) -> Record:
    """Write a shard, then its record. Safe to repeat, and for two writers at once."""
    data, entry = writer.finish("unnamed.tar")
    entry = entry.model_copy(update={"name": f"{PREFIX}{shard.prefix}-{entry.sha256[:12]}.tar"})
    store.write(entry.name, data)
    record = Record(plan_sha256=plan.sha256(), start=shard.start, shard=entry, made_by=maker)
    store.write(record_name(shard), _json(record))
    return record


def unfinished(store: Store, plan: Plan, shards: Iterable[ShardRange]) -> list[ShardRange]:
    """Return those of `shards` that have no record, or whose file is not what the record says."""
    present = set(store.names(RECORDS))

    def finished(shard: ShardRange) -> bool:
        if f"{shard.prefix}.json" not in present:
            return False
        try:
            record = _read(store, record_name(shard), Record)
            return record.plan_sha256 == plan.sha256() and _intact(store, record.shard)
        except DataError:
            return False

    shards = list(shards)
    with ThreadPoolExecutor(READERS) as pool:
        return [shard for shard, done in zip(shards, pool.map(finished, shards), strict=True) if not done]


def missing(store: Store, plan: Plan) -> list[ShardRange]:
    """Return the shards that have no record yet; cheap, whatever the size of the images."""
    present = set(store.names(RECORDS))
    return [shard for shard in plan.shards() if f"{shard.prefix}.json" not in present]


def merge(store: Store, *, verify: bool = False, tidy: bool = False) -> Manifest:
    """Make one data set of all parts: write manifest.json, then dataset.json. Safe to repeat, and for two at once.

    With `verify` every shard is read and its SHA-256 compared. With `tidy` what is not needed any more is
    removed; only for when no part runs any more.

    Raises TryAgainError while parts are missing, DataError when a part does not belong or is damaged.
    """
    manifest = read_manifest(store)
    if manifest is not None:
        dataset = open_dataset(store)
    else:
        plan = read_plan(store)
        if plan is None:
            raise DataError(f"{store.location}: no generation here; expected the --out of dcgan-generate")
        if lacking := missing(store, plan):
            raise TryAgainError(
                f"{store.location}: {len(lacking)} of {len(plan.shards())} shards are not there yet, the first with "
                f"images {lacking[0].start} to {lacking[0].end - 1}; let every part finish, or run it again"
            )
        manifest, dataset = _assemble(store, plan)
    if verify:
        _verify(manifest, dataset)
    store.write(MANIFEST, _json(manifest, 1))
    store.write(DATASET_FILE, _json(dataset))
    if tidy:
        _tidy(store, manifest)
    return manifest


def _assemble(store: Store, plan: Plan) -> tuple[Manifest, Dataset]:
    """Return the manifest and the data set that the records make."""
    with ThreadPoolExecutor(READERS) as pool:
        records = list(pool.map(lambda shard: _read(store, record_name(shard), Record), plan.shards()))
    for shard, record in zip(plan.shards(), records, strict=True):
        if record.plan_sha256 != plan.sha256() or record.start != shard.start or record.shard.images != shard.images:
            raise DataError(
                f"{store.path(record_name(shard))}: belongs to another generation (another model or range); "
                "delete it and run its part again"
            )
    makers = list(dict.fromkeys(record.made_by.model_dump_json() for record in records))
    shards = [
        ManifestShard(
            name=record.shard.name,
            start=record.start,
            images=record.shard.images,
            bytes=record.shard.bytes,
            sha256=record.shard.sha256,
            made_by=makers.index(record.made_by.model_dump_json()),
        )
        for record in records
    ]
    total = sum(shard.bytes for shard in shards)
    manifest = Manifest(
        plan=plan,
        images=plan.count,
        bytes=total,
        made_by=[Maker.model_validate_json(maker) for maker in makers],
        shards=shards,
    )
    dataset = Dataset(
        image_size=plan.image_size,
        channels=plan.channels,
        encoding=plan.format,
        source={"kind": "generated", **plan.model_dump()},
        images=plan.count,
        bytes=total,
        shards=[record.shard for record in records],
    ).at(store)
    return manifest, dataset


def _verify(manifest: Manifest, dataset: Dataset) -> None:
    """Read every shard. Where one is missing or damaged, open the generation again for it and raise DataError."""
    store = dataset.store
    with ThreadPoolExecutor(READERS) as pool:
        intact = list(pool.map(lambda shard: _intact(store, shard), manifest.shards))
    if all(intact):
        return
    store.write(PLAN, _json(manifest.plan, 1))
    for good, shard, entry in zip(intact, manifest.shards, dataset.shards, strict=True):
        name = f"{RECORDS}/{shard.start:012d}.json"
        if good:
            maker = manifest.made_by[shard.made_by]
            record = Record(plan_sha256=manifest.plan.sha256(), start=shard.start, shard=entry, made_by=maker)
            store.write(name, _json(record))
        else:
            store.delete(name)
    store.delete(DATASET_FILE)
    store.delete(MANIFEST)
    first = manifest.shards[intact.index(False)]
    raise DataError(
        f"{store.path(first.name)}: missing or damaged, and {intact.count(False) - 1} others; "
        "run dcgan-generate as before: it makes these again and keeps the rest"
    )


def _intact(store: Store, shard: Shard | ManifestShard) -> bool:
    try:
        data = store.read(shard.name)
    except DataError:
        return False
    return len(data) == shard.bytes and sha256_bytes(data) == shard.sha256


def _tidy(store: Store, manifest: Manifest) -> None:
    """Remove the records, and shards that no manifest names: left by a part that was killed and made elsewhere."""
    wanted = {shard.name for shard in manifest.shards}
    for name in store.names():
        if name.lstrip(".").startswith(PREFIX) and name not in wanted:
            store.delete(name)
    store.delete(RECORDS)


def _json(value: BaseModel, indent: int | None = None) -> bytes:
    return (value.model_dump_json(indent=indent) + "\n").encode()


def _read(store: Store, name: str, model: type[Model]) -> Model:
    try:
        return model.model_validate_json(store.read(name))
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"{store.path(name)}: {'.'.join(map(str, first['loc']))}: {first['msg']}; written by another version?"
        ) from None
