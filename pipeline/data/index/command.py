"""`dcgan-data index`, and data sets that are named by their tars alone."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.common.partition import parse_partition
from pipeline.common.shapes.frame import Fit
from pipeline.common.shapes.size import Channels
from pipeline.common.storage import Store, require_writable
from pipeline.common.telemetry import Telemetry
from pipeline.data.build.options import BuildOptions
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.index import indexer, state
from pipeline.data.specification import expand, is_specification


@dataclass(frozen=True)
class IndexOptions:
    """The command line of `dcgan-data index`; its help says what each option does."""

    spec: str
    tars: list[str]
    """What `spec` names."""
    out: str
    size: int | str
    channels: Channels
    min_side: int
    fit: Fit
    fill: str
    max_bad: float | None
    part: str | None
    workers: int | None
    overwrite: bool
    metrics_port: int | None
    metrics_address: str
    push_gateway: str | None


def index(options: IndexOptions) -> None:
    """Index the tars that SPEC names in OUT, and print the result."""
    part = parse_partition(options.part)
    with Telemetry("build", run=options.out, part=str(part)) as telemetry:
        telemetry.start(options.metrics_port, options.metrics_address, options.push_gateway)
        require_writable(options.out)
        dataset = indexer.make_index(
            options.tars,
            options.out,
            spec=options.spec,
            size=options.size,
            channels=options.channels,
            min_side=options.min_side,
            fit=options.fit,
            fill=options.fill,
            workers=options.workers,
            part=part,
            max_bad=options.max_bad,
            overwrite=options.overwrite,
            telemetry=telemetry,
        )
    if dataset is None:
        print(f"{options.out}: part {part} is finished. When all parts are: dcgan-data merge OUT PART…")
        return
    report(dataset)


def report(dataset: Dataset) -> None:
    """Print what an index holds."""
    print(
        f"{dataset.location}: {dataset.images:,} images in {len(dataset.shards):,} tars "
        f"({dataset.bytes / 1e6:,.1f} MB), read as {dataset.in_words}"
    )
    if dataset.refused.count:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in dataset.refused.reasons.items())
        print(f"left out: {dataset.refused.count:,} ({reasons}); named in {dataset.store.path(state.REFUSED)}")


def is_index(out: str, parts: list[str]) -> bool:
    """Whether what is to be merged are parts of an index rather than of a build."""
    return any(Store(location).exists(state.STATE_FILE) for location in [*parts, out])


@contextmanager
def data_set(location: str) -> Iterator[Dataset]:
    """Yield the data set at `location`, or, if that is a shard specification, an index of it for the time being."""
    if not is_specification(location):
        yield open_dataset(location)
        return
    with tempfile.TemporaryDirectory(prefix="dcgan-index-") as folder:
        dataset = indexer.make_index(expand(location), folder, spec=location, size=BuildOptions.size)
        assert dataset is not None
        yield dataset
