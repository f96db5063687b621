"""State of a build in OUT: what is finished, what is under way, and whether OUT may be written or cleared."""

import os
import re
from contextlib import suppress
from typing import Annotated, Any

from pydantic import Field

from pipeline.common.errors import ConfigConflict, DataError, UsageError
from pipeline.common.records import LARGEST, Record, read_record
from pipeline.common.storage import Store, is_url
from pipeline.data.build.plan import Plan
from pipeline.data.dataset import DATASET_FILE, Dataset, Shard, open_dataset
from pipeline.data.index.sidecar import SIDECAR_FILE
from pipeline.data.shard_table import TABLE_FILE

STATE_FOLDER = ".build"
STATE_FILE = f"{STATE_FOLDER}/plan.json"
CLEARING = f"{STATE_FOLDER}/clearing"
"""Marks that an old data set is being removed, so that a killed removal is completed. See `tidy` for its end."""
REFUSED, SKIPPED = "refused.txt", "skipped.txt"
FACES_SHEET = "faces.png"
DUPLICATES_REPORT, DUPLICATES_SHEET, DUPLICATES_TABLE = "duplicates.json", "duplicates.png", "duplicates.tsv"
REPORTS = (REFUSED, SKIPPED, FACES_SHEET, DUPLICATES_REPORT, DUPLICATES_SHEET, DUPLICATES_TABLE)
"""What a build, or `dedup`, writes beside the shards for people to read."""
CONTACT_SHEET = "sheet.png"
"""What `show` writes there."""
SHARD = re.compile(r"[0-9]{6}(-[0-9]+)?\.tar")
_RECORD = re.compile(r"[0-9]{6,12}\.json")
HINT = "--overwrite starts again from nothing"
REPLACE = "--overwrite replaces it; with --part, `dcgan-data clear` removes it first"


class BuildState(Record):
    """OUT/.build/plan.json: the build that is under way."""

    plan: Plan
    location: str
    refused: list[tuple[str, str]]
    """Pictures that the listing refused, as (name, reason)."""
    lost: dict[str, Annotated[int, Field(ge=0, le=LARGEST)]]
    """Pictures that the listing lost without their names: their number by reason."""
    damaged: bool
    """Whether the source itself is damaged."""


class Group(Record):
    """OUT/.build/NUMBER.json: a finished group."""

    shards: list[Shard]
    refused: list[tuple[str, str]]
    skipped: list[tuple[str, str]]
    """Good pictures that give no image, for example without a face, as (name, reason)."""
    stretched: list[float] = Field(default_factory=list)
    """Of pictures that were stretched: the logarithm of width over height of each."""
    sizes: dict[str, Annotated[int, Field(ge=0, le=LARGEST)]] = Field(default_factory=dict)
    """Pictures by the shorter side that they had: the lower end of its step in SIZE_STEPS."""
    other_colors: int = Field(0, ge=0, le=LARGEST)
    """Pictures with a color profile that could not be used."""


def group_name(group: int) -> str:
    """Return the file name of a group's record."""
    return f"{STATE_FOLDER}/{group:06d}.json"


def shard_name(group: int, number: int) -> str:
    """Return a shard's file name. A group overflows into further shards only when its images are unusually large."""
    return f"{group:06d}.tar" if number == 0 else f"{group:06d}-{number}.tar"


def is_record(name: str) -> bool:
    """Whether a build, and no other program, writes a file `name` into STATE_FOLDER."""
    return name in ("plan.json", "clearing", "hash-of.txt") or _RECORD.fullmatch(name) is not None


def find_finished(out: str, plan: Plan) -> Dataset | None:
    """Return the finished data set in `out` if it has the identity of `plan`, or None if there is none.

    Raises ConfigConflict when another data set, or another build under way, is there.
    """
    store = Store(out)
    if store.exists(DATASET_FILE):
        dataset = open_dataset(store)
        compare(identity(plan), built_as(dataset), out)
        tidy(store)  # the build may have been killed just before this
        return dataset
    finish_clearing(out)
    if store.exists(STATE_FILE):
        compare(identity(plan), identity(read_state(store).plan), out)
    else:
        refuse_foreign(out)
    return None


def refuse_overlap(src: str, out: str) -> None:
    """Raise UsageError when SRC is OUT or lies in it: the build would replace what it reads."""
    source, target = _resolved(src), _resolved(out)
    if source == target or source.startswith(target.rstrip("/") + "/"):
        raise UsageError(f"{out}: OUT is SRC or holds it ({src}), and the build would delete it; choose another OUT")


def _resolved(location: str) -> str:
    """Return a location in the one form that equal ones share."""
    local = location.removeprefix("file://")
    return local.rstrip("/") if is_url(local) else os.path.realpath(local)


def refuse_foreign(out: str) -> None:
    """Raise UsageError when `out` holds files but neither a data set nor a build."""
    names = set(Store(out).names())
    if not {DATASET_FILE, STATE_FOLDER} & names and names - {*REPORTS, CONTACT_SHEET}:
        raise UsageError(f"{out}: not empty, and not a data set of dcgan-data; choose an empty or new folder")


def prepare(out: str, plan: Plan, *, overwrite: bool) -> Dataset | None:
    """Return the finished data set in `out` if it has the identity of `plan`; with `overwrite`, remove it instead.

    An unfinished build of the same plan is kept in any case, to be resumed.
    """
    try:
        finished = find_finished(out, plan)
    except (ConfigConflict, DataError):
        if not overwrite:
            raise
    else:
        if finished is None or not overwrite:
            return finished
    clear(out)
    return None


def clear(out: str) -> None:
    """Remove a data set or an unfinished build, and nothing else. `finish_clearing` completes a killed removal.

    Raises UsageError when tars lie beside an index: they are its user's, and may have the names of ours.
    """
    store = Store(out)
    names = store.names()
    indexed = SIDECAR_FILE in names
    if indexed and any(name.endswith(".tar") for name in names):
        raise UsageError(f"{out}: holds an index, and tars that are not its own; choose another OUT")
    if DATASET_FILE in names or STATE_FOLDER in names:
        with suppress(FileNotFoundError):  # another process has just finished the same removal
            store.write(CLEARING, b"")
        records = [f"{STATE_FOLDER}/{name}" for name in store.names(STATE_FOLDER)]
        shards = [name for name in names if SHARD.fullmatch(name)]
        # First the files that vouch for the others. The mark stays until the next build is finished: see `tidy`.
        reports = [name for name in REPORTS if name in names]
        for name in [
            DATASET_FILE,
            STATE_FILE,
            *shards,
            *reports,
            *records,
            *[SIDECAR_FILE] * indexed,
            *[TABLE_FILE] * (TABLE_FILE in names),
        ]:
            if name != CLEARING:
                store.delete(name)


def finish_clearing(out: str) -> None:
    """Remove what a killed `clear` left behind: shards and records without a data set or a plan."""
    store = Store(out)
    if store.exists(CLEARING) and not store.exists(STATE_FILE) and not store.exists(DATASET_FILE):
        clear(out)


def tidy(store: Store) -> None:
    """Remove what a finished data set does not need: the records, and half-written files of killed processes."""
    if store.names(STATE_FOLDER):
        store.delete(STATE_FOLDER)
    store.remove_abandoned()


def identity(plan: Plan) -> dict[str, Any]:
    """Return the identity of a build, as dataset.json records it: builds with equal identities write equal bytes."""
    return {**plan.source, **plan.model_dump(exclude={"source", "labels"})}


def built_as(dataset: Dataset) -> dict[str, Any]:
    """Return the identity of the build that made a data set."""
    return {
        key: value
        for key, value in dataset.source.items()
        if key not in ("location", "aspect", "sizes", "other_colors")
    }


def compare(wanted: dict[str, Any], found: dict[str, Any], where: str, advice: str = REPLACE) -> None:
    """Raise ConfigConflict, with the differences, unless the identities `wanted` and `found` are equal."""
    different = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if not different:
        return
    if set(different) <= {"listing", "pictures", "groups"}:
        raise ConfigConflict(
            f"{where}: was built from other pictures ({found.get('pictures')} listed then, "
            f"{wanted.get('pictures')} now); {advice}"
        )
    shown = [key for key in different if key not in ("listing", "pictures", "groups")]
    what = ", ".join(f"{key}={found.get(key)!r} there, {wanted.get(key)!r} now" for key in shown)
    raise ConfigConflict(f"{where}: holds a data set built with other options: {what}; {advice}")


def finished_groups(store: Store) -> list[int]:
    """Return the groups that have a record in `store`, in order."""
    return sorted(int(name[:-5]) for name in store.names(STATE_FOLDER) if _RECORD.fullmatch(name))


def read_state(store: Store) -> BuildState:
    """Return what is being built in `store`. Raises DataError when another version wrote it."""
    return read_record(BuildState, store.read(STATE_FILE), store.path(STATE_FILE), hint=HINT)


def read_group(store: Store, group: int) -> Group:
    """Return the record of a finished group. Raises DataError when another version wrote it, or it is another's."""
    name = group_name(group)
    record = read_record(Group, store.read(store.inside(name)), store.path(name), hint=HINT)
    for number, shard in enumerate(record.shards):
        if shard.name != shard_name(group, number):
            raise DataError(f"{store.path(name)}: names {shard.name}, expected {shard_name(group, number)}; {HINT}")
    return record
