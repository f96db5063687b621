"""The place where a data set is built: what is finished there, what is under way, and whether it may be touched."""

import os
import re
from typing import Any, TypeVar

from pydantic import ValidationError

from pipeline.common.errors import ConfigConflict, DataError, UsageError
from pipeline.common.storage import Store, is_url
from pipeline.data.build.plan import Plan
from pipeline.data.dataset import FILE_NAME, Dataset, Record, Shard, load_dataset

STATE = ".build"
PLAN = f"{STATE}/plan.json"
CLEARING = f"{STATE}/clearing"
"""Here while, and after, an old data set is removed: a killed removal is known by it, and gone on with."""
REFUSED, SKIPPED = "refused.txt", "skipped.txt"
REPORTS = "duplicates."
"""What `dedup` writes beside the data set begins with this."""

R = TypeVar("R", bound=Record)


class State(Record):
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
    return f"{STATE}/{group:06d}.json"


def find_finished(out: str, plan: Plan) -> Dataset | None:
    """Return the data set that is already in `out` if it is just what `plan` asks for.

    Raises ConfigConflict when it, or a build under way there, is another one.
    """
    store = Store(out)
    if store.exists(FILE_NAME):
        dataset = load_dataset(out)
        compare(identity(plan), built_as(dataset), out)
        tidy(store)  # it may have been killed just before it did
        return dataset
    finish_clearing(out)
    if store.exists(PLAN):
        compare(identity(plan), identity(read_state(store).plan), out)
    else:
        check_place(out)
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


def check_place(out: str) -> None:
    """Raise UsageError when `out` holds anything that is not ours."""
    names = Store(out).names()
    if not {FILE_NAME, STATE} & set(names) and any(not name.startswith(REPORTS) for name in names):
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
    if FILE_NAME in names or STATE in names:
        store.write(CLEARING, b"")
        records = [f"{STATE}/{name}" for name in store.names(STATE)]
        shards = [name for name in names if re.fullmatch(r"\d{6}(-\d+)?\.tar", name)]
        # First what the others are believed for. The mark stays until the next build is finished: see `tidy`.
        for name in [FILE_NAME, PLAN, *shards, REFUSED, SKIPPED, *records]:
            if name != CLEARING:
                store.delete(name)


def finish_clearing(out: str) -> None:
    """Remove what a killed `clear` has left: shards and records that no data set or plan stands for any more."""
    store = Store(out)
    if store.exists(CLEARING) and not store.exists(PLAN) and not store.exists(FILE_NAME):
        clear(out)


def tidy(store: Store) -> None:
    """Remove what a finished data set does not need: the records, and files that a killed process was writing."""
    if store.names(STATE):
        store.delete(STATE)
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
    present = set(store.names(STATE))
    names = {index: group_name(index) for index in wanted}
    return {i: read_record(store, name, Group) for i, name in names.items() if name.rpartition("/")[2] in present}


def read_state(store: Store) -> State:
    return read_record(store, PLAN, State)


def read_record(store: Store, name: str, kind: type[R]) -> R:
    """Read a record of a build under way. Raises DataError when another version wrote it."""
    try:
        return kind.model_validate_json(store.read(name))
    except ValidationError as error:
        raise DataError(
            f"{store.path(name)}: not of this version ({error.errors()[0]['msg']}); --overwrite starts anew"
        ) from None


def local_writable(out: str) -> None:
    """Create the folder OUT now, so that a wrong path fails before any work. Raises OSError."""
    if not is_url(out):
        os.makedirs(out, exist_ok=True)
