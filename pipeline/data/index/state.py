"""The index that is under way in OUT: its plan, the records of finished groups of tars, and what OUT may hold."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.common.errors import ConfigConflict, DataError, UsageError
from pipeline.common.records import Record, read_record
from pipeline.common.shapes.frame import Fit
from pipeline.common.shapes.size import Channels, between
from pipeline.common.storage import Store
from pipeline.data.dataset import DATASET_FILE, LARGEST_IMAGE, Dataset, LabelType, open_dataset
from pipeline.data.index.labels import Labels, TypedColumn
from pipeline.data.index.sidecar import SIDECAR_FILE, MemberColumns, read_arrays, write_arrays

STATE_FOLDER = ".index"
STATE_FILE = f"{STATE_FOLDER}/plan.json"
REFUSED = "refused.txt"
KIND = "index"
"""The source of an indexed data set, as dataset.json names it."""
MOST_GROUPS = 64
MOST_GROUP_TARS = 16
HINT = "--overwrite starts again from nothing"
_META = "meta"


class Plan(Record):
    """OUT/.index/plan.json: what is to be indexed. Indexes with equal plans are equal, unless the tars changed."""

    spec: str
    """What was typed; no part of the identity."""
    tars: list[str]
    """Absolute paths and URLs, in their order."""
    size: between(1, LARGEST_IMAGE)  # type: ignore[valid-type]
    channels: Channels
    min_side: int
    fit: Fit = "crop"
    fill: str = ""

    @property
    def group_tars(self) -> int:
        """Tars that are finished together."""
        return max(1, min(MOST_GROUP_TARS, -(-len(self.tars) // MOST_GROUPS)))

    @property
    def groups(self) -> int:
        """Number of groups."""
        return -(-len(self.tars) // self.group_tars)

    def group(self, index: int) -> range:
        """Return the numbers of a group's tars."""
        return range(index * self.group_tars, min((index + 1) * self.group_tars, len(self.tars)))

    def source(self) -> dict[str, Any]:
        """Return what dataset.json says of the source."""
        return {
            "kind": KIND,
            "spec": self.spec,
            "tars": len(self.tars),
            "listing": hashlib.sha256("\n".join(self.tars).encode("utf-8", "surrogateescape")).hexdigest(),
            "size": self.size,
            "channels": self.channels,
            "min_side": self.min_side,
            **({} if self.fit == "crop" else {"fit": self.fit, "fill": self.fill}),
        }


class IndexedShard(Record):
    """What a record says of one tar."""

    number: int
    """Its place in the plan."""
    images: int
    """That can be used; there may be none."""
    bytes: int
    sha256: str
    etag: str | None


class GroupMeta(Record):
    """What a record says beside its columns."""

    shards: list[IndexedShard]
    labels: dict[str, LabelType]
    refused: list[tuple[str, str]]
    damaged: list[tuple[str, str]]
    """Damaged tars, as (path or URL, what is wrong)."""
    notes: dict[str, int]


@dataclass(frozen=True)
class Group:
    """The record of a finished group: OUT/.index/NUMBER.npz."""

    meta: GroupMeta
    columns: MemberColumns

    @property
    def labels(self) -> Labels:
        """The columns of labels with their names and types."""
        pairs = zip(self.meta.labels.items(), self.columns.labels, strict=True)
        return {name: TypedColumn(kind, column) for (name, kind), column in pairs}

    def pack(self) -> bytes:
        """Return the file."""
        arrays = {_META: np.frombuffer(self.meta.model_dump_json().encode(), np.uint8)}
        return write_arrays(arrays | self.columns.arrays())


def group_name(group: int) -> str:
    """Return the file name of a group's record."""
    return f"{STATE_FOLDER}/{group:06d}.npz"


def read_group(store: Store, group: int) -> Group:
    """Return the record of a finished group. Raises DataError when it is damaged."""
    name = group_name(group)
    where = store.path(name)
    arrays = read_arrays(store.read(name), where)
    if _META not in arrays:
        raise DataError(f"{where}: damaged; remove it, and run the same command again")
    meta = read_record(GroupMeta, arrays[_META].tobytes(), where, hint=HINT)
    try:
        return Group(meta, MemberColumns.unpack(arrays, len(meta.labels)))
    except KeyError:
        raise DataError(f"{where}: damaged; remove it, and run the same command again") from None


def finished_groups(store: Store) -> set[int]:
    """Return the groups that are finished."""
    names = store.names(STATE_FOLDER)
    return {int(name[:-4]) for name in names if name.endswith(".npz") and name[:-4].isdigit()}


def read_plan(store: Store) -> Plan:
    """Return what is being indexed in `store`. Raises DataError when another version wrote it."""
    return read_record(Plan, store.read(STATE_FILE), store.path(STATE_FILE), hint=HINT)


def prepare(store: Store, plan: Plan, *, overwrite: bool) -> Dataset | None:
    """Return the finished index in `store` if it is that of `plan`; with `overwrite`, remove it instead.

    An unfinished index of the same plan is kept in any case, to be resumed. Raises ConfigConflict when another is
    there, UsageError when anything else is: this removes nothing but indexes.
    """
    names = store.names()
    if DATASET_FILE in names:
        dataset = open_dataset(store)
        if dataset.index is None:
            raise UsageError(f"{store.location}: holds a data set with images of its own; choose another OUT")
        if not overwrite:
            compare(plan.source(), dataset.source, store.location)
            tidy(store)  # the command may have been killed just before this
            return dataset
    elif STATE_FOLDER in names:
        if not store.exists(STATE_FILE):  # another part is just beginning
            return None
        wanted, found = plan.source(), read_plan(store).source()
        if not overwrite or not _different(wanted, found):
            compare(wanted, found, store.location)
            return None
    elif names:
        raise UsageError(f"{store.location}: not empty, and not an index; choose an empty or new folder for OUT")
    # The plan last: records without one would be taken for those of the next.
    records = [f"{STATE_FOLDER}/{name}" for name in store.names(STATE_FOLDER)]
    for name in (DATASET_FILE, *(name for name in records if name != STATE_FILE), STATE_FILE, SIDECAR_FILE, REFUSED):
        store.delete(name)
    return None


def compare(wanted: dict[str, Any], found: dict[str, Any], where: str, advice: str = HINT) -> None:
    """Raise ConfigConflict, with the differences, unless two sources are equal."""
    different = _different(wanted, found)
    if not different:
        return
    if set(different) <= {"tars", "listing"}:
        raise ConfigConflict(
            f"{where}: is an index of other tars ({found.get('tars')} of {found.get('spec')} there, "
            f"{wanted['tars']} of {wanted['spec']} now); {advice}"
        )
    what = ", ".join(f"{key}={found.get(key)!r} there, {wanted.get(key)!r} now" for key in different)
    raise ConfigConflict(f"{where}: is an index with other options: {what}; {advice}")


def _different(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [key for key in {**found, **wanted} if key not in ("spec", "aspect") and found.get(key) != wanted.get(key)]


def tidy(store: Store) -> None:
    """Remove the records, which a finished index does not need, and half-written files of killed processes."""
    if store.names(STATE_FOLDER):
        store.delete(STATE_FOLDER)
    store.remove_abandoned()
