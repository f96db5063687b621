"""Builds a data set: turns groups of pictures into shards on all cores. A build can be resumed, and split into parts.

During a build, OUT/.build holds its plan and one record for each finished group. `dataset.json` is written last,
and then the records are removed. Without dataset.json there is no data set.
"""

import math
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace

from pydantic import ValidationError

from pipeline.common.errors import DataError, escaped
from pipeline.common.imaging import BadImage, Picture, aspect_of, keeps_other_colors, size_of
from pipeline.common.partition import Partition
from pipeline.common.progress import Progress
from pipeline.common.records import first_problem
from pipeline.common.storage import Store, is_url, public_name
from pipeline.common.telemetry import Telemetry
from pipeline.data.build.clear import clear
from pipeline.data.build.plan import PlannedBuild
from pipeline.data.build.process_pool import run_tasks
from pipeline.data.build.records import READ_AHEAD, Records, accepted_share, check_records, check_shards, read_records
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
    read_state,
    refuse_foreign,
    shard_name,
    tidy,
)
from pipeline.data.build.transform import Recipe, Skipped
from pipeline.data.dataset import DATASET_FILE, Dataset, LabelType, Shard, open_dataset, write_dataset
from pipeline.data.shard_reader import read_shard
from pipeline.data.shard_writer import ShardWriter, write_shard
from pipeline.data.sources.interface import Item, Listing, RefusalLog, Source, gathered, printable, read_picture

REMOTE_READERS = 8
"""Pictures fetched at the same time by each process, when they come from a URL."""
SIZE_STEPS = (1, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Shorter sides of pictures, in pixels, are counted by these steps, each up to the next."""
COPIERS = 8
"""Groups that a merge copies at the same time from or to a store; each is held in memory."""


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
    seconds: Counter[str]
    """What it was spent on: reading, converting (decode, resize, encode), writing."""


class Stopwatch:
    """Adds up what time is spent on."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._since = time.perf_counter()

    def lap(self, what: str) -> None:
        """Note that the time since the last lap was spent on this."""
        now = time.perf_counter()
        self.seconds[what] += now - self._since  # type: ignore[assignment]  # typeshed counts with integers only
        self._since = now


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
        aspects: list[float] = []
        sizes: Counter[str] = Counter()
        other_colors = 0
        watch = Stopwatch()
        for item, picture in self._pictures(task.items):
            watch.lap("reading")
            try:
                if isinstance(picture, BadImage):
                    raise picture
                made = self.recipe.make(item, picture)
                if self.recipe.fit == "stretch":
                    aspects.append(math.log(aspect_of(picture, self.recipe.frame)))
                sizes[str(SIZE_STEPS[bisect_right(SIZE_STEPS, min(size_of(picture))) - 1])] += 1
                other_colors += keeps_other_colors(picture)
            except BadImage as error:
                log.add(item.key, str(error))
                continue
            except Skipped as reason:
                skipped.append((printable(item.key), str(reason)))
                continue
            finally:
                watch.lap("converting")
            for key, image, labels in made:
                if not writer.add(image, key, labels):
                    shards.append(write_shard(store, shard_name(task.index, len(shards)), writer))
                    writer = self._writer(task.index, len(shards))
                    writer.add(image, key, labels)
            watch.lap("writing")
        if writer.images:
            shards.append(write_shard(store, shard_name(task.index, len(shards)), writer))
        record = Group(
            shards=shards,
            refused=log.entries,
            skipped=skipped,
            stretched=aspects,
            sizes=sizes,
            other_colors=other_colors,
        )
        store.write(group_name(task.index), record.model_dump_json().encode())
        watch.lap("writing")
        return Built(len(task.items), log.count, sum(shard.bytes for shard in shards), watch.seconds)

    def _writer(self, group: int, number: int) -> ShardWriter:
        prefix = shard_name(group, number).removesuffix(".tar")
        return ShardWriter(prefix, self.recipe.encoding, list(self.labels), self.shard_bytes)

    def _pictures(self, items: list[Item]) -> Iterator[tuple[Item, Picture | BadImage]]:
        """Yield every picture in order; remote ones are fetched ahead."""
        if not self.remote:
            yield from ((item, self._read(item)) for item in items)
            return
        with ThreadPoolExecutor(REMOTE_READERS) as readers:
            for start in range(0, len(items), 8 * REMOTE_READERS):
                some = items[start : start + 8 * REMOTE_READERS]
                yield from zip(some, readers.map(self._read, some), strict=True)

    def _read(self, item: Item) -> Picture | BadImage:
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
        state = read_state(store)
        found = read_records({index: store for index in finished_groups(store) if index in mine})
        if part.count > 1:
            check_records(state, found, mine, max_bad, out)
            check_shards(store, found, alone=False)  # the other parts may be at work in the same folder
            return None
        if not len(found.shards):
            clear(out, out)  # nothing is worth keeping, and what follows refuses
        return _finish(store, state, found, max_bad)


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
    left = [index for index in mine if f"{index:06d}.json" not in present]
    total = sum(len(build.span(index)) for index in mine)
    done = total - sum(len(build.span(index)) for index in left)
    items = (item for index in left for item in build.group(index))
    tasks = (Task(index, build.group(index)) for index in left)
    metrics.set("dcgan_build_info", 1, source=build.plan.source["kind"], encoding=builder.recipe.encoding)
    metrics.add("dcgan_build_target_images", total)
    metrics.add("dcgan_build_skipped_images_total", done)
    metrics.set("dcgan_build_last_shard_timestamp_seconds", time.time())
    bad = listing.refused.count
    with (
        gathered(builder.source, items, workers) as near,
        Progress("building", total, "pictures", done=done) as progress,
        closing(run_tasks(replace(builder, source=near).build, tasks, workers)) as finished,
    ):
        spent: Counter[str] = Counter()
        for built in finished:
            spent.update(built.seconds)
            progress.note = _shares(spent)
            progress.advance(built.pictures)
            metrics.add("dcgan_build_images_total", built.pictures - built.refused)
            metrics.add("dcgan_build_refused_images_total", built.refused)
            metrics.add("dcgan_build_written_bytes_total", built.bytes)
            metrics.set("dcgan_build_last_shard_timestamp_seconds", time.time())
            bad += built.refused
            if bad > accepted_share(max_bad) * (build.plan.pictures + listing.refused.count):
                return  # the checks of the caller raise


def _shares(seconds: Counter[str]) -> str:
    """Return what the processes are busy with: "reading 12 %, converting 80 %, writing 8 %"."""
    total = max(sum(seconds.values()), 1e-9)
    return ", ".join(f"{what} {share / total:.0%}".replace("%", " %") for what, share in seconds.items())


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
    origins = {index: place for place in reversed([target, *stores]) for index in finished_groups(place)}
    origins = {index: place for index, place in origins.items() if index in everything}
    found = read_records(origins)
    check_records(state, found, everything, max_bad, out)
    if not target.exists(STATE_FILE):
        target.write(STATE_FILE, state.model_dump_json().encode())
    _copy_groups(target, {index: place for index, place in sorted(origins.items()) if place is not target})
    return _finish(target, state, found, max_bad)


def _copy_groups(target: Store, origins: dict[int, Store]) -> None:
    """Copy finished groups into `target`, each with its record last."""

    def copy(index: int) -> None:
        group = read_group(origins[index], index)
        for shard in group.shards:
            target.write(shard.name, read_shard(origins[index], shard))
        target.write(group_name(index), group.model_dump_json().encode())

    remote = target.remote or any(place.remote for place in origins.values())
    with ThreadPoolExecutor(COPIERS if remote else 1) as pool, Progress("copying", len(origins), "groups") as progress:
        groups = list(origins)
        for start in range(0, len(groups), READ_AHEAD):
            for _ in pool.map(copy, groups[start : start + READ_AHEAD]):
                progress.advance(1)


def _finish(store: Store, state: BuildState, found: Records, max_bad: float | None) -> Dataset:
    """Write dataset.json from the records of all groups; remove the records. Raises DataError when some are missing."""
    plan = state.plan
    refused = check_records(state, found, range(plan.groups), max_bad, store.location)
    skipped = sorted(found.skipped)
    if not len(found.shards):
        examples = "; ".join(f"{key}: {reason}" for key, reason in (refused.entries + skipped)[:3])
        raise DataError(f"{state.location}: none of {plan.pictures:,} pictures gives an image ({examples})")
    try:
        dataset = Dataset(
            image_size=plan.source.get("size"),
            channels=plan.source.get("channels"),
            encoding=plan.source.get("encoding"),
            labels=plan.labels,
            source={"location": public_name(state.location), **identity(plan), **found.measured()},
            images=sum(found.shards.images.tolist()),
            bytes=sum(found.shards.bytes.tolist()),
            shards=found.shards,
            refused=refused.summary(),
        ).at(store)
    except ValidationError as error:
        raise DataError(f"{store.path(STATE_FILE)}: its plan is damaged: {first_problem(error)}; {HINT}") from None
    check_shards(store, found, alone=True)
    for name, entries in ((REFUSED, sorted(refused.entries)), (SKIPPED, skipped)):
        if entries:
            lines = (f"{escaped(key)}\t{escaped(reason)}\n" for key, reason in entries)
            store.write(name, "".join(lines).encode())
    dataset = write_dataset(dataset)
    tidy(store)
    return dataset
