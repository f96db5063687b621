"""The place where a data set is built: what is finished there, what is under way, and whether it may be touched."""

import os
import re
from typing import Any

from pipeline.common.errors import ConfigConflict, DataError, UsageError
from pipeline.common.records import Record, read_record
from pipeline.common.storage import Store, is_url
from pipeline.data.build.plan import Plan
from pipeline.data.dataset import DATASET_FILE, Dataset, Shard, open_dataset

STATE_FOLDER = ".build"
STATE_FILE = f"{STATE_FOLDER}/plan.json"
CLEARING = f"{STATE_FOLDER}/clearing"
"""Here while, and after, an old data set is removed: a killed removal is known by it, and gone on with."""
REFUSED, SKIPPED = "refused.txt", "skipped.txt"
REPORTS = "duplicates."
"""What `dedup` writes beside the data set begins with this."""

HINT = "--overwrite starts anew"


class BuildState(Record):
    """OUT/.build/plan.json: what is being built here."""

    plan: Plan
    location: str
    refused: list[tuple[str, str]]
    """Pictures that already the listing refused."""
    lost: dict[str, int]
    """The same without names."""
    damaged: bool


class Group(Record):
    """OUT/.build/NUMBER.json: a finished group."""

    shards: list[Shard]
    refused: list[tuple[str, str]]
    skipped: list[tuple[str, str]]
    """Good pictures that hold nothing for the data set, such as no face."""


def group_name(group: int) -> str:
    """Return the name of a group's record."""
    return f"{STATE_FOLDER}/{group:06d}.json"


def find_finished(out: str, plan: Plan) -> Dataset | None:
    """Return the data set that is already in `out` if it is just what `plan` asks for.

    Raises ConfigConflict when it, or a build under way there, is another one.
    """
    store = Store(out)
    if store.exists(DATASET_FILE):
        dataset = open_dataset(store)
        compare(identity(plan), built_as(dataset), out)
        tidy(store)  # it may have been killed just before it did
        return dataset
    finish_clearing(out)
    if store.exists(STATE_FILE):
        compare(identity(plan), identity(read_state(store).plan), out)
    else:
        refuse_foreign(out)
    return None


def refuse_overlap(src: str, out: str) -> None:
    """Raise UsageError when SRC is OUT or lies in it: what a build replaces there would be what it reads."""
    source, target = _resolved(src), _resolved(out)
    if source == target or source.startswith(target.rstrip("/") + "/"):
        raise UsageError(f"{out}: OUT is SRC or holds it ({src}), and the build would delete it; choose another OUT")


def _resolved(location: str) -> str:
    """Return a location in the one form that equal ones share."""
    local = location.removeprefix("file://")
    return local.rstrip("/") if is_url(local) else os.path.realpath(local)


def refuse_foreign(out: str) -> None:
    """Raise UsageError when `out` holds anything that is not ours."""
    names = Store(out).names()
    if not {DATASET_FILE, STATE_FOLDER} & set(names) and any(not name.startswith(REPORTS) for name in names):
        raise UsageError(f"{out}: not empty, and no data set of ours; choose an empty or new folder")


def prepare(out: str, plan: Plan, *, overwrite: bool) -> Dataset | None:
    """Return the finished data set in `out` if it is what `plan` asks for; with `overwrite`, make room instead.

    A build of the same plan that is under way is kept in any case: it goes on.
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
    """Remove a data set or an unfinished build, and nothing else; `finish_clearing` goes on when this is killed."""
    store = Store(out)
    names = store.names()
    if DATASET_FILE in names or STATE_FOLDER in names:
        store.write(CLEARING, b"")
        records = [f"{STATE_FOLDER}/{name}" for name in store.names(STATE_FOLDER)]
        shards = [name for name in names if re.fullmatch(r"\d{6}(-\d+)?\.tar", name)]
        # First what the others are believed for. The mark stays until the next build is finished: see `tidy`.
        for name in [DATASET_FILE, STATE_FILE, *shards, REFUSED, SKIPPED, *records]:
            if name != CLEARING:
                store.delete(name)


def finish_clearing(out: str) -> None:
    """Remove what a killed `clear` has left: shards and records that no data set or plan stands for any more."""
    store = Store(out)
    if store.exists(CLEARING) and not store.exists(STATE_FILE) and not store.exists(DATASET_FILE):
        clear(out)


def tidy(store: Store) -> None:
    """Remove what a finished data set does not need: the records, and files that a killed process was writing."""
    if store.names(STATE_FOLDER):
        store.delete(STATE_FOLDER)
    store.remove_abandoned()


def identity(plan: Plan) -> dict[str, Any]:
    """Return what two builds of the same data set share, as it stands in dataset.json."""
    return {**plan.source, **plan.model_dump(exclude={"source", "labels"})}


def built_as(dataset: Dataset) -> dict[str, Any]:
    """Return the identity of the build that made a data set."""
    return {key: value for key, value in dataset.source.items() if key != "location"}


def compare(wanted: dict[str, Any], found: dict[str, Any], where: str, advice: str = "--overwrite replaces it") -> None:
    """Raise ConfigConflict that shows the difference between a build and what is there, and says what to do."""
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


def read_groups(store: Store, wanted: range) -> dict[int, Group]:
    """Return the records of those of the wanted groups that are finished, in their order."""
    present = set(store.names(STATE_FOLDER))
    names = {index: group_name(index) for index in wanted}
    return {i: read_group(store, name) for i, name in names.items() if name.rpartition("/")[2] in present}


def read_state(store: Store) -> BuildState:
    """Return what is being built in `store`. Raises DataError when another version wrote it."""
    return read_record(BuildState, store.read(STATE_FILE), store.path(STATE_FILE), hint=HINT)


def read_group(store: Store, name: str) -> Group:
    """Return the record `name` of a finished group. Raises DataError when another version wrote it."""
    return read_record(Group, store.read(name), store.path(name), hint=HINT)


def make_local_folder(out: str) -> None:
    """Create the folder OUT now, so that a wrong path fails before any work. Raises OSError."""
    if not is_url(out):
        os.makedirs(out, exist_ok=True)
