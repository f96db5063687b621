"""Builds a data set: turns groups of pictures into shards on all cores. A build can be resumed, and split into parts.

During a build, OUT/.build holds its plan and one record for each finished group. `dataset.json` is written last,
and then the records are removed. Without dataset.json there is no data set.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from pydantic import ValidationError

from pipeline.common.errors import DataError, escaped
from pipeline.common.imaging import BadImage, Pixels
from pipeline.common.partition import Partition
from pipeline.common.progress import Progress
from pipeline.common.records import first_problem
from pipeline.common.storage import Store, is_url, public_name
from pipeline.common.telemetry import Telemetry
from pipeline.data.build.clear import clear
from pipeline.data.build.options import DEFAULT_MAX_BAD
from pipeline.data.build.plan import PlannedBuild
from pipeline.data.build.process_pool import run_tasks
from pipeline.data.build.state import (
    HINT,
    REFUSED,
    SKIPPED,
    STATE_FILE,
    STATE_FOLDER,
    BuildState,
    Group,
    built_as,
    compare,
    finish_clearing,
    group_name,
    identity,
    read_groups,
    read_state,
    refuse_foreign,
    shard_name,
    tidy,
)
from pipeline.data.build.transform import Recipe, Skipped
from pipeline.data.commit import require_recorded
from pipeline.data.dataset import DATASET_FILE, Dataset, LabelType, Shard, open_dataset, write_dataset
from pipeline.data.shard_reader import read_shard
from pipeline.data.shard_writer import ShardWriter, write_shard
from pipeline.data.sources.interface import Item, Listing, RefusalLog, Source, printable, read_picture

REMOTE_READERS = 8
"""Pictures fetched at the same time by each process, when they come from a URL."""


@dataclass(frozen=True)
class Task:
    """One group of pictures: what a worker process receives."""

    index: int
    items: list[Item]


@dataclass(frozen=True)
class Built:
    """Counts of a finished group: what a worker process returns."""

    pictures: int
    refused: int
    bytes: int


@dataclass(frozen=True)
class Builder:
    """Turns one group of pictures into shards. It is sent to every worker process."""

    source: Source
    recipe: Recipe
    labels: dict[str, LabelType]
    shard_bytes: int
    out: str
    remote: bool

    def build(self, task: Task) -> Built:
        """Write the group's shards and its record; return their counts."""
        store = Store(self.out)
        log, skipped = RefusalLog(), []
        shards: list[Shard] = []
        writer = self._writer(task.index, 0)
        for item, picture in self._pictures(task.items):
            try:
                if isinstance(picture, BadImage):
                    raise picture
                made = self.recipe.make(item, picture)
            except BadImage as error:
                log.add(item.key, str(error))
                continue
            except Skipped as reason:
                skipped.append((printable(item.key), str(reason)))
                continue
            for key, image, labels in made:
                if not writer.add(image, key, labels):
                    shards.append(write_shard(store, shard_name(task.index, len(shards)), writer))
                    writer = self._writer(task.index, len(shards))
                    writer.add(image, key, labels)
        if writer.images:
            shards.append(write_shard(store, shard_name(task.index, len(shards)), writer))
        record = Group(shards=shards, refused=log.entries, skipped=skipped)
        store.write(group_name(task.index), record.model_dump_json().encode())
        return Built(len(task.items), log.count, sum(shard.bytes for shard in shards))

    def _writer(self, group: int, number: int) -> ShardWriter:
        prefix = shard_name(group, number).removesuffix(".tar")
        return ShardWriter(prefix, self.recipe.encoding, list(self.labels), self.shard_bytes)

    def _pictures(self, items: list[Item]) -> Iterator[tuple[Item, bytes | Pixels | BadImage]]:
        """Yield every picture in order; remote ones are fetched ahead."""
        if not self.remote:
            yield from ((item, self._read(item)) for item in items)
            return
        with ThreadPoolExecutor(REMOTE_READERS) as readers:
            for start in range(0, len(items), 8 * REMOTE_READERS):
                some = items[start : start + 8 * REMOTE_READERS]
                yield from zip(some, readers.map(self._read, some), strict=True)

    def _read(self, item: Item) -> bytes | Pixels | BadImage:
        try:
            return read_picture(self.source, item)
        except BadImage as error:
            return error


def run(
    source: Source,
    listing: Listing,
    build: PlannedBuild,
    recipe: Recipe,
    *,
    location: str,
    out: str,
    workers: int,
    part: Partition | None = None,
    max_bad: float | None = None,
    telemetry: Telemetry | None = None,
) -> Dataset | None:
    """Build the groups that are missing, and finish the data set. After a part, return None: `merge` finishes it.

    Raises DataError when more than the share `max_bad` of the pictures cannot be used. The default is
    DEFAULT_MAX_BAD, with no picture lost to a damaged source. What was built is kept: the same build with another
    `max_bad` resumes there.
    """
    store, plan = Store(out), build.plan
    state = BuildState(
        plan=plan,
        location=location,
        refused=listing.refused.entries,
        lost=dict(listing.refused.unnamed),
        damaged=listing.damaged,
    )
    part = part or Partition()
    mine = part.slice(plan.groups)
    remote = any(is_url(file) for file in listing.files or [location])
    builder = Builder(source, recipe, plan.labels, plan.shard_bytes, out, remote)
    metrics = telemetry or Telemetry("build", run=out, part=str(part))
    with store.made():
        if not store.exists(STATE_FILE):
            store.write(STATE_FILE, state.model_dump_json().encode())
        try:
            _build_groups(builder, build, mine, listing, workers, max_bad, metrics)
        finally:  # workers are stopped in the middle of a file
            for folder in ("", STATE_FOLDER):
                store.remove_abandoned(folder)
        state, groups = read_state(store), read_groups(store, mine)
        if part.count > 1:
            _check_groups(state, groups, mine, max_bad, out)
            _check_shards(store, groups, alone=False)  # the other parts may be at work in the same folder
            return None
        if not any(group.shards for group in groups.values()):
            clear(out, out)  # nothing is worth keeping, and what follows refuses
        return _finish(store, state, groups, max_bad)


def _build_groups(
    builder: Builder,
    build: PlannedBuild,
    mine: range,
    listing: Listing,
    workers: int,
    max_bad: float | None,
    metrics: Telemetry,
) -> None:
    """Build those of the groups `mine` that have no record yet, or fewer when too many pictures are unusable."""
    present = set(Store(builder.out).names(STATE_FOLDER))
    tasks = [Task(index, build.group(index)) for index in mine if f"{index:06d}.json" not in present]
    total = sum(len(build.group(index)) for index in mine)
    done = total - sum(len(task.items) for task in tasks)
    metrics.set("dcgan_build_info", 1, source=build.plan.source["kind"], encoding=builder.recipe.encoding)
    metrics.add("dcgan_build_target_images", total)
    metrics.add("dcgan_build_skipped_images_total", done)
    metrics.set("dcgan_build_last_shard_timestamp_seconds", time.time())
    bad = listing.refused.count
    with (
        Progress("building", total, "pictures", done=done) as progress,
        closing(run_tasks(builder.build, tasks, workers)) as finished,
    ):
        for built in finished:
            progress.advance(built.pictures)
            metrics.add("dcgan_build_images_total", built.pictures - built.refused)
            metrics.add("dcgan_build_refused_images_total", built.refused)
            metrics.add("dcgan_build_written_bytes_total", built.bytes)
            metrics.set("dcgan_build_last_shard_timestamp_seconds", time.time())
            bad += built.refused
            if bad > _share(max_bad) * (build.plan.pictures + listing.refused.count):
                return  # the checks of the caller raise


def merge(out: str, parts: Sequence[str], *, max_bad: float | None = None) -> Dataset:
    """Join the parts of a build in `out` and finish the data set. `out` may itself hold parts.

    Raises ConfigConflict when `out` or a part belongs to another build, DataError when a part is missing or damaged.
    Parts that do not make a whole are refused before one is copied.
    """
    target = Store(out)
    finished = open_dataset(target) if target.exists(DATASET_FILE) else None
    if finished is None:
        refuse_foreign(out)
        finish_clearing(out)
    state = read_state(target) if finished is None and target.exists(STATE_FILE) else None
    stores = [Store(location) for location in parts]
    for location, store in zip(parts, stores, strict=True):
        if not store.exists(STATE_FILE):
            raise DataError(f"{location}: holds no part of a build; expected the OUT of `dcgan-data build … --part`")
        part = read_state(store)
        if finished is not None:
            compare(identity(part.plan), built_as(finished), out, "choose another OUT")
        else:
            state = state or part
            compare(identity(part.plan), identity(state.plan), out, f"{location} is not a part of that build")
    if finished is not None:
        tidy(target)  # the merge before may have been killed just before this
        return finished
    if state is None:
        raise DataError(f"{out}: holds no part of a build; name the folders of the parts: merge OUT PART0 PART1 …")
    everything = range(state.plan.groups)
    groups, origins = read_groups(target, everything), dict[int, Store]()
    for store in stores:
        new = {index: group for index, group in read_groups(store, everything).items() if index not in groups}
        groups |= new
        origins |= dict.fromkeys(new, store)
    groups = dict(sorted(groups.items()))
    _check_groups(state, groups, everything, max_bad, out)
    if not target.exists(STATE_FILE):
        target.write(STATE_FILE, state.model_dump_json().encode())
    for index, store in origins.items():
        for shard in groups[index].shards:
            target.write(shard.name, read_shard(store, shard))
        target.write(group_name(index), groups[index].model_dump_json().encode())
    return _finish(target, state, groups, max_bad)


def _finish(store: Store, state: BuildState, groups: dict[int, Group], max_bad: float | None) -> Dataset:
    """Write dataset.json from the records of all groups; remove the records. Raises DataError when some are missing."""
    plan = state.plan
    refused = _check_groups(state, groups, range(plan.groups), max_bad, store.location)
    shards = [shard for group in groups.values() for shard in group.shards]
    skipped = sorted(entry for group in groups.values() for entry in group.skipped)
    if not shards:
        examples = "; ".join(f"{key}: {reason}" for key, reason in (refused.entries + skipped)[:3])
        raise DataError(f"{state.location}: none of {plan.pictures:,} pictures gives an image ({examples})")
    try:
        dataset = Dataset(
            image_size=plan.source.get("size"),
            channels=plan.source.get("channels"),
            encoding=plan.source.get("encoding"),
            labels=plan.labels,
            source={"location": public_name(state.location), **identity(plan)},
            images=sum(shard.images for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            shards=shards,
            refused=refused.summary(),
        ).at(store)
    except ValidationError as error:
        raise DataError(f"{store.path(STATE_FILE)}: its plan is damaged: {first_problem(error)}; {HINT}") from None
    _check_shards(store, groups, alone=True)
    for name, entries in ((REFUSED, sorted(refused.entries)), (SKIPPED, skipped)):
        if entries:
            lines = (f"{escaped(key)}\t{escaped(reason)}\n" for key, reason in entries)
            store.write(name, "".join(lines).encode())
    dataset = write_dataset(dataset)
    tidy(store)
    return dataset


def _check_groups(
    state: BuildState, groups: dict[int, Group], wanted: range, max_bad: float | None, out: str
) -> RefusalLog:
    """Return all refusals. Raises DataError when they are too many, or when a wanted group has no record."""
    refused = _refusals(state, groups.values())
    _check_refusals(refused, state, max_bad)
    if missing := len(wanted) - len(groups):  # of a damaged plan there may be too many to list
        first = next(index for index in wanted if index not in groups)
        raise DataError(
            f"{out}: {missing} of {len(wanted)} groups are missing (the first is {first}); "
            "build the missing parts, then merge again"
        )
    return refused


def _check_shards(store: Store, groups: dict[int, Group], *, alone: bool) -> None:
    """Raise DataError unless the shards of `groups`, and where they are `alone` no others, are in `store`.

    The next build makes those that are not there again.
    """

    def forget(lost: set[str]) -> None:
        for index, group in groups.items():
            if lost & {shard.name for shard in group.shards}:
                store.delete(group_name(index))

    require_recorded(
        store,
        (shard for group in groups.values() for shard in group.shards),
        forget=forget,
        spare=lambda name: not alone,
        advice="build again with the same options (and --part): what is missing is made again, the rest is kept",
    )


def _share(max_bad: float | None) -> float:
    return DEFAULT_MAX_BAD if max_bad is None else max_bad


def _refusals(state: BuildState, groups: Iterable[Group]) -> RefusalLog:
    """Return all refusals of the listing and of the given groups."""
    log = RefusalLog(list(state.refused))
    log.unnamed.update(state.lost)
    for group in groups:
        log.entries += group.refused
    return log


def _check_refusals(refused: RefusalLog, state: BuildState, max_bad: float | None) -> None:
    """Raise DataError when too many pictures cannot be used."""
    pictures = state.plan.pictures + len(state.refused) + sum(state.lost.values())
    share = refused.count / pictures
    names = "; ".join(f"{key}: {reason}" for key, reason in refused.entries[:3])
    lost = "; ".join(f"{number:,} {reason}" for reason, number in refused.unnamed.items())
    what = "; ".join(filter(None, (names, lost)))
    advice = "repair the source, or accept them with --max-bad"
    if state.damaged and max_bad is None:
        raise DataError(f"{state.location}: {what}. {advice} {share + 0.0005:.3f} (what could be read is kept)")
    if share > _share(max_bad):
        raise DataError(
            f"{state.location}: {refused.count:,} of {pictures:,} pictures cannot be used, more than "
            f"{_share(max_bad):.1%} ({what}); {advice}"
        )
