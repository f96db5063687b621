"""Builds a data set: turns groups of pictures into shards on all cores. A build can be resumed, and split into parts.

During a build, OUT/.build holds its plan and one record for each finished group. `dataset.json` is written last,
and then the records are removed. Without dataset.json there is no data set.
"""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pydantic import ValidationError

from pipeline.common.errors import DataError, escaped
from pipeline.common.imaging import BadImage, Pixels
from pipeline.common.partition import Partition
from pipeline.common.progress import Progress
from pipeline.common.records import first_problem
from pipeline.common.storage import Store, is_url, public_name
from pipeline.common.telemetry import Telemetry
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
    finished_groups,
    group_name,
    identity,
    read_group,
    read_groups,
    read_state,
    refuse_foreign,
    shard_name,
    tidy,
)
from pipeline.data.build.transform import Recipe, Skipped
from pipeline.data.dataset import DATASET_FILE, Dataset, LabelType, Shard, dump_dataset, open_dataset
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
    if not store.exists(STATE_FILE):
        store.write(STATE_FILE, state.model_dump_json().encode())
    part = part or Partition()
    mine = part.slice(plan.groups)
    present = set(store.names(STATE_FOLDER))
    todo = [index for index in mine if f"{index:06d}.json" not in present]
    remote = any(is_url(file) for file in listing.files or [location])
    builder = Builder(source, recipe, plan.labels, plan.shard_bytes, out, remote)
    tasks = [Task(index, build.group(index)) for index in todo]
    total = sum(len(build.group(index)) for index in mine)
    done = total - sum(len(task.items) for task in tasks)
    metrics = telemetry or Telemetry("build", run=out, part=str(part))
    metrics.set("dcgan_build_info", 1, source=plan.source["kind"], encoding=recipe.encoding)
    metrics.add("dcgan_build_target_images", total)
    metrics.add("dcgan_build_skipped_images_total", done)
    metrics.set("dcgan_build_last_shard_timestamp_seconds", time.time())
    with Progress("building", total, "pictures", done=done) as progress:
        bad = listing.refused.count
        for built in run_tasks(builder.build, tasks, workers):
            progress.advance(built.pictures)
            metrics.add("dcgan_build_images_total", built.pictures - built.refused)
            metrics.add("dcgan_build_refused_images_total", built.refused)
            metrics.add("dcgan_build_written_bytes_total", built.bytes)
            metrics.set("dcgan_build_last_shard_timestamp_seconds", time.time())
            bad += built.refused
            if bad > _share(max_bad) * (plan.pictures + listing.refused.count):
                break  # the check below raises
    if part.count > 1:
        built_here = read_groups(store, mine)
        _check_refusals(_refusals(state, built_here.values()), state, max_bad, out)
        return None
    return finish(out, max_bad=max_bad)


def merge(out: str, parts: Iterable[str], *, max_bad: float | None = None) -> Dataset:
    """Join the parts of a build in `out` and finish the data set. `out` may itself hold parts.

    Raises ConfigConflict when `out` or a part belongs to another build, DataError when a part is missing or damaged.
    """
    target = Store(out)
    finished = open_dataset(target) if target.exists(DATASET_FILE) else None
    if finished is None:
        refuse_foreign(out)
        finish_clearing(out)
    for location in parts:
        store = Store(location)
        if not store.exists(STATE_FILE):
            raise DataError(f"{location}: holds no part of a build; expected the OUT of `dcgan-data build … --part`")
        plan = identity(read_state(store).plan)
        if finished is not None:
            compare(plan, built_as(finished), out, "choose another OUT")
            continue
        if target.exists(STATE_FILE):
            compare(plan, identity(read_state(target).plan), out, f"{location} is not a part of that build")
        else:
            target.write(STATE_FILE, store.read(STATE_FILE))
        present = set(finished_groups(target))
        for index in finished_groups(store):
            if index in present:
                continue
            group = read_group(store, index)
            for shard in group.shards:
                target.write(shard.name, read_shard(store, shard))
            target.write(group_name(index), group.model_dump_json().encode())
    if finished is not None:
        tidy(target)  # the merge before may have been killed just before this
        return finished
    if not target.exists(STATE_FILE):
        raise DataError(f"{out}: holds no part of a build; name the folders of the parts: merge OUT PART0 PART1 …")
    return finish(out, max_bad=max_bad)


def finish(out: str, *, max_bad: float | None) -> Dataset:
    """Write dataset.json from the records of all groups; remove the records. Raises DataError when some are missing."""
    store = Store(out)
    state = read_state(store)
    plan = state.plan
    groups = read_groups(store, range(plan.groups))
    refused = _refusals(state, groups.values())
    _check_refusals(refused, state, max_bad, out)
    if missing := plan.groups - len(groups):
        first = next(index for index in range(plan.groups) if index not in groups)
        raise DataError(
            f"{out}: {missing} of {plan.groups} groups are missing (the first is {first}); "
            "build the missing parts, then merge again"
        )
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
    for name, entries in ((REFUSED, sorted(refused.entries)), (SKIPPED, skipped)):
        if entries:
            lines = (f"{escaped(key)}\t{escaped(reason)}\n" for key, reason in entries)
            store.write(name, "".join(lines).encode())
    store.write(DATASET_FILE, dump_dataset(dataset))
    tidy(store)
    return dataset


def _share(max_bad: float | None) -> float:
    return DEFAULT_MAX_BAD if max_bad is None else max_bad


def _refusals(state: BuildState, groups: Iterable[Group]) -> RefusalLog:
    """Return all refusals of the listing and of the given groups."""
    log = RefusalLog(list(state.refused))
    log.unnamed.update(state.lost)
    for group in groups:
        log.entries += group.refused
    return log


def _check_refusals(refused: RefusalLog, state: BuildState, max_bad: float | None, out: str) -> None:
    """Raise DataError when too many pictures cannot be used."""
    pictures = state.plan.pictures + len(state.refused) + sum(state.lost.values())
    share = refused.count / pictures
    names = "; ".join(f"{key}: {reason}" for key, reason in refused.entries[:3])
    lost = "; ".join(f"{number:,} {reason}" for reason, number in refused.unnamed.items())
    what = "; ".join(filter(None, (names, lost)))
    advice = "repair the source, or accept them with --max-bad"
    if state.damaged and max_bad is None:
        raise DataError(
            f"{state.location}: {what}. {advice} {share + 0.0005:.3f} (what can be read is already in {out})"
        )
    if share > _share(max_bad):
        raise DataError(
            f"{state.location}: {refused.count:,} of {pictures:,} pictures cannot be used, more than "
            f"{_share(max_bad):.1%} ({what}); {advice}"
        )
