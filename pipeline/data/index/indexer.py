"""Makes an indexed data set: scans groups of tars on all cores, or a part of them, and joins what they hold.

While it is under way, OUT/.index holds its plan and one record for each finished group. `dataset.json` is written
last, and then the records are removed.
"""

import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.common.errors import DataError, UsageError
from pipeline.common.machine import available_cores
from pipeline.common.partition import Partition
from pipeline.common.progress import Progress
from pipeline.common.shapes.frame import Fit
from pipeline.common.shapes.size import Channels
from pipeline.common.storage import Store, is_url, locate, sha256_bytes
from pipeline.common.telemetry import Telemetry
from pipeline.data.build.options import DEFAULT_MAX_BAD
from pipeline.data.build.process_pool import run_tasks
from pipeline.data.dataset import DATASET_FILE, Dataset, Shard, dump_dataset, open_dataset
from pipeline.data.index import state
from pipeline.data.index.class_order import sorted_labels
from pipeline.data.index.labels import Labels, join_labels
from pipeline.data.index.reader import opened
from pipeline.data.index.samples import BLOCKS, IndexedTar, index_tar
from pipeline.data.index.sidecar import SIDECAR_FILE, MemberColumns, Sidecar, Texts, write_arrays
from pipeline.data.index.state import Group, GroupMeta, IndexedShard, Plan
from pipeline.data.sources.interface import RefusalLog, printable
from pipeline.data.specification import short_names

REMOTE_TARS = 8
"""Tars that a process reads at the same time when they come from stores."""
RECORDS = 8
"""Records of finished groups that are read at the same time."""
NAMED = 5
"""Damaged tars, and samples that cannot be used, that an error names."""
CUT = "damaged: only what precedes the damage is used"
"""The reason of a damaged tar in refused.txt."""


@dataclass(frozen=True)
class Task:
    """A group of tars, each (number, path or URL, short name): what a worker process receives."""

    index: int
    tars: list[tuple[int, str, str]]


@dataclass(frozen=True)
class Done:
    """Counts of a finished group: what a worker process returns."""

    tars: int
    images: int
    refused: int


@dataclass(frozen=True)
class Indexer:
    """Scans one group of tars. It is sent to every worker process."""

    out: str
    min_side: int

    def index(self, task: Task) -> Done:
        """Write the group's record; return its counts. Raises UserError when a tar cannot be read."""
        if any(is_url(tar) for _, tar, _ in task.tars):
            with ThreadPoolExecutor(REMOTE_TARS) as readers:
                found = list(readers.map(self._read, task.tars))
        else:
            found = list(map(self._read, task.tars))
        group = _record(task, found)
        Store(self.out).write(state.group_name(task.index), group.pack())
        return Done(len(found), len(group.columns), len(group.meta.refused) + len(group.meta.damaged))

    def _read(self, tar: tuple[int, str, str]) -> IndexedTar:
        _, location, shown = tar
        with opened(*locate(location)) as file:
            return index_tar(file, shown, min_side=self.min_side)


def _record(task: Task, found: list[IndexedTar]) -> Group:
    """Return the record of a group's tars."""
    shards = [
        IndexedShard(number=number, images=len(tar.offset), bytes=tar.bytes, sha256=tar.ending.sha256, etag=tar.etag)
        for (number, _, _), tar in zip(task.tars, found, strict=True)
    ]
    labels = join_labels([(len(tar.offset), tar.labels) for tar in found])
    notes = sum((tar.notes for tar in found), Counter[str]())
    meta = GroupMeta(
        shards=shards,
        labels={name: typed.kind for name, typed in labels.items()},
        refused=[entry for tar in found for entry in tar.refused],
        damaged=[
            (location, tar.ending.damage)
            for (_, location, _), tar in zip(task.tars, found, strict=True)
            if tar.ending.damage is not None
        ],
        notes=dict(notes),
    )
    return Group(meta, _join([_columns(tar) for tar in found], labels))


def _columns(tar: IndexedTar) -> MemberColumns:
    return MemberColumns(tar.offset, tar.size, tar.width, tar.height, tar.key, [])


def _join(parts: Sequence[MemberColumns], labels: Labels) -> MemberColumns:
    """Return the rows of `parts` one after another, with the labels that all of them have."""
    return MemberColumns(
        offset=np.concatenate([part.offset for part in parts]),
        size=np.concatenate([part.size for part in parts]),
        width=np.concatenate([part.width for part in parts]),
        height=np.concatenate([part.height for part in parts]),
        key=Texts.join([part.key for part in parts]),
        labels=[typed.column for typed in labels.values()],
    )


def make_index(
    tars: Sequence[str],
    out: str | Path | Store,
    *,
    spec: str | None = None,
    size: int | str,
    channels: Channels = 3,
    min_side: int = 1,
    fit: Fit = "crop",
    fill: str = "",
    workers: int | None = None,
    part: Partition | None = None,
    max_bad: float | None = None,
    overwrite: bool = False,
    telemetry: Telemetry | None = None,
) -> Dataset | None:
    """Index `tars` (paths or URLs, in their order) in `out`, and return the data set; after a part, None.

    An index of the same tars and options that is finished is returned at once, without a look at the tars; one that
    is not is resumed. `spec` is what the user typed for the tars, for messages and dataset.json.

    Raises ConfigConflict when `out` holds another index, UsageError when it holds anything else; DataError when a tar
    is missing, when tars are damaged and `max_bad` is None, and when more than the share `max_bad` (by default
    DEFAULT_MAX_BAD) of the samples cannot be used. What was found is kept, and another `max_bad` resumes there.
    """
    store = out if isinstance(out, Store) else Store(out)
    for tar in tars:
        if printable(tar) != tar:
            raise UsageError(f"{printable(tar)}: a name that is not UTF-8, which JSON cannot hold; rename it")
    plan = Plan(
        spec=spec or (tars[0] if len(tars) == 1 else f"{tars[0]} and {len(tars) - 1} more"),
        tars=[tar if is_url(tar) else str(Path(tar).absolute()) for tar in tars],
        size=size,
        channels=channels,
        min_side=min_side,
        fit=fit,
        fill=fill,
    )
    if (finished := state.prepare(store, plan, overwrite=overwrite)) is not None:
        return finished
    if not store.exists(state.STATE_FILE):
        store.write(state.STATE_FILE, plan.model_dump_json().encode())
    part = part or Partition()
    _run(plan, store, part, workers or available_cores(), telemetry or Telemetry("build", run=store.location))
    if part.count > 1:
        mine = [state.read_group(store, index).meta for index in part.slice(plan.groups)]
        _check(plan, mine, max_bad, store)
        return None
    return finish(store, max_bad=max_bad)


def _run(plan: Plan, store: Store, part: Partition, workers: int, metrics: Telemetry) -> None:
    """Scan the groups of a part that are not finished."""
    mine = part.slice(plan.groups)
    present = state.finished_groups(store)
    shown = short_names(plan.tars)
    tasks = [
        Task(index, [(number, plan.tars[number], shown[number]) for number in plan.group(index)])
        for index in mine
        if index not in present
    ]
    total, left = sum(len(plan.group(index)) for index in mine), sum(len(task.tars) for task in tasks)
    metrics.set("dcgan_build_info", 1, source=state.KIND, encoding="tar")
    metrics.set("dcgan_build_last_shard_timestamp_seconds", time.time())
    with Progress("indexing", total, "tars", done=total - left) as progress:
        for done in run_tasks(Indexer(store.location, plan.min_side).index, tasks, workers):
            progress.advance(done.tars)
            metrics.add("dcgan_build_images_total", done.images)
            metrics.add("dcgan_build_refused_images_total", done.refused)
            metrics.set("dcgan_build_last_shard_timestamp_seconds", time.time())


def merge(out: str, parts: Iterable[str], *, max_bad: float | None = None) -> Dataset:
    """Join the parts of an index in `out`, which may itself hold parts, and finish it.

    Raises ConfigConflict when `out` or a part belongs to another index, DataError when a part is missing or damaged.
    """
    target = Store(out)
    for location in parts:
        store = Store(location)
        plan = state.read_plan(store)
        if target.exists(DATASET_FILE):
            state.compare(plan.source(), open_dataset(target).source, out, "choose another OUT")
            continue
        if target.exists(state.STATE_FILE):
            state.compare(plan.source(), state.read_plan(target).source(), out, f"{location} is no part of that index")
        else:
            target.write(state.STATE_FILE, plan.model_dump_json().encode())
        for index in state.finished_groups(store) - state.finished_groups(target):
            target.write(state.group_name(index), store.read(state.group_name(index)))
    if target.exists(DATASET_FILE):
        state.tidy(target)
        return open_dataset(target)
    return finish(target, max_bad=max_bad)


def finish(store: Store, *, max_bad: float | None) -> Dataset:
    """Write the sidecar and dataset.json from the records of all groups, and remove the records.

    Raises DataError when records are missing, or too much cannot be used.
    """
    plan = state.read_plan(store)
    present = state.finished_groups(store)
    if missing := [index for index in range(plan.groups) if index not in present]:
        raise DataError(
            f"{store.location}: {len(missing)} of {plan.groups} groups of tars are missing (the first is "
            f"{missing[0]}); index the missing parts, then merge again"
        )
    with ThreadPoolExecutor(RECORDS) as readers:
        groups = list(readers.map(partial(state.read_group, store), range(plan.groups)))
    metas = [group.meta for group in groups]
    refused = _check(plan, metas, max_bad, store)
    shards = [_shard(plan, entry) for meta in metas for entry in meta.shards if entry.images]
    if not shards:
        examples = "; ".join(f"{key}: {reason}" for key, reason in refused.entries[:NAMED])
        raise DataError(
            f"{plan.spec}: no image in {len(plan.tars):,} tars{f' ({examples})' if examples else ''}{_hint(metas)}"
        )
    labels = join_labels([(len(group.columns), group.labels) for group in groups])
    labels = dict(sorted(labels.items()))
    packed = write_arrays(_join([group.columns for group in groups], labels).arrays())
    with ThreadPoolExecutor(1) as thread:  # to write takes as long as to hash
        sha256 = thread.submit(sha256_bytes, packed)
        store.write(SIDECAR_FILE, packed)
    dataset = Dataset(
        image_size=plan.size,
        channels=plan.channels,
        encoding="tar",
        labels={name: typed.kind for name, typed in labels.items()},
        source=plan.source() | _aspect(plan, groups),
        images=sum(shard.images for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        shards=shards,
        refused=refused.summary(),
        index=Sidecar(name=SIDECAR_FILE, bytes=len(packed), sha256=sha256.result()),
    ).at(store)
    if refused.entries:
        store.write(state.REFUSED, "".join(f"{key}\t{reason}\n" for key, reason in refused.entries).encode())
    store.write(DATASET_FILE, dump_dataset(dataset))
    state.tidy(store)
    _say(metas, labels)
    return dataset


def _aspect(plan: Plan, groups: list[Group]) -> dict[str, float]:
    """Return {"aspect": the geometric mean of width over height}, where pictures are stretched."""
    if plan.fit != "stretch":
        return {}
    ratios = np.concatenate([group.columns.width / np.maximum(group.columns.height, 1) for group in groups])
    return {"aspect": round(float(np.exp(np.log(np.maximum(ratios, 1e-6)).mean())), 6)}


def _shard(plan: Plan, entry: IndexedShard) -> Shard:
    location = plan.tars[entry.number]
    # A plain name, whatever the tar is called: `location` alone says where it is.
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", location.partition("?")[0].rpartition("/")[2]).removesuffix(".tar")
    return Shard(
        name=f"{name or 'tar'}.tar",
        images=entry.images,
        bytes=entry.bytes,
        sha256=entry.sha256,
        offsets=[],
        sizes=[],
        location=location,
        etag=entry.etag,
    )


def _check(plan: Plan, metas: list[GroupMeta], max_bad: float | None, store: Store) -> RefusalLog:
    """Return all that cannot be used. Raises DataError when it is too much."""
    log = RefusalLog()
    images = 0
    damaged: list[tuple[str, str]] = []
    for meta in metas:
        images += sum(shard.images for shard in meta.shards)
        damaged += meta.damaged
        log.entries += [(location, CUT) for location, _ in meta.damaged]
        log.entries += meta.refused
    share = log.count / max(1, images + log.count)
    accept = f"--max-bad {min(1.0, share + 0.0005):.3f}"
    if damaged and max_bad is None:
        names = "; ".join(f"{location}: {what}" for location, what in damaged[:NAMED])
        more = f"; and {len(damaged) - NAMED:,} more" if len(damaged) > NAMED else ""
        raise DataError(
            f"{names}{more}. {len(damaged):,} of {len(plan.tars):,} tars cannot be read to their end: copy or make "
            f"them again, or accept the loss with {accept} (what was found is kept in {store.location})"
        )
    if share > (DEFAULT_MAX_BAD if max_bad is None else max_bad):
        names = "; ".join(f"{key}: {reason}" for key, reason in log.entries[:NAMED])
        raise DataError(
            f"{plan.spec}: {log.count:,} of {images + log.count:,} samples cannot be used, more than "
            f"{DEFAULT_MAX_BAD if max_bad is None else max_bad:.1%} ({names}); accept them with {accept}{_hint(metas)}"
        )
    return log


def _hint(metas: list[GroupMeta]) -> str:
    """Return what else an error about missing images says."""
    blocks = sum(meta.notes.get(BLOCKS, 0) for meta in metas)
    return f". There are {blocks:,} {BLOCKS}: dcgan-data build webdataset" if blocks else ""


def _say(metas: list[GroupMeta], labels: Labels) -> None:
    """Print what was passed over, and whether the order is one of classes."""
    notes = sum((Counter(meta.notes) for meta in metas), Counter[str]())
    for what, number in sorted(notes.items()):
        print(f"note: passed over {number:,} {what}", file=sys.stderr)
    if empty := sum(not shard.images for meta in metas for shard in meta.shards):
        print(f"note: {empty:,} tars hold no image that can be used", file=sys.stderr)
    for name, share in sorted_labels(labels).items():
        print(
            f"warning: the images are sorted by the label {name!r} ({share:.0%} of the way from a random order to one "
            "class after the other), so a batch may hold few classes; the trainer's recipe.mix_shards mixes them",
            file=sys.stderr,
        )
