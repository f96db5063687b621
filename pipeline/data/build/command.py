"""`dcgan-data build`: options to a source, a plan, a data set."""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.common.errors import Stopped, UsageError
from pipeline.common.imaging import encode, grid
from pipeline.common.machine import available_cores
from pipeline.common.partition import Part, parse_part
from pipeline.common.storage import Store, sha256_file
from pipeline.common.telemetry import Telemetry
from pipeline.data.build import builder as build
from pipeline.data.build import state as place
from pipeline.data.build.plan import Selection, make_work
from pipeline.data.build.transform import DEFAULT_QUALITY, Recipe
from pipeline.data.dataset import Dataset, Encoding
from pipeline.data.shard_reader import iterate
from pipeline.data.sources.interface import Listing, Source
from pipeline.data.sources.registry import open_source

FACES_SHEET = "faces.png"


@dataclass(frozen=True)
class BuildOptions:
    """The command line of `dcgan-data build`; its help says what each is."""

    kind: str
    src: str
    out: str
    size: int = 64
    channels: int = 3
    encoding: Encoding = "packed"
    quality: int | None = None
    min_side: int = 1
    labels: str | None = None
    categories: tuple[str, ...] = ()
    source_split: str | None = None
    where: tuple[str, ...] = ()
    limit: int | None = None
    val_fraction: float = 0.0
    seed: int = 0
    shard_bytes: int = 32_000_000
    shard_images: int | None = None
    max_bad: float | None = None
    part: str | None = None
    workers: int | None = None
    overwrite: bool = False
    min_face: int | None = None
    margin: float | None = None
    model: str | None = None
    metrics_port: int | None = None
    metrics_address: str = "127.0.0.1"
    push_gateway: str | None = None


def build_all(options: BuildOptions) -> None:
    """Build OUT, or with a validation share OUT/train and OUT/val, and say what was made."""
    signal.signal(signal.SIGTERM, _stop)
    part = parse_part(options.part)
    place.refuse_overlap(options.src, options.out)
    given = {"labels": options.labels, "categories": options.categories or None, "split": options.source_split}
    given = {name: value for name, value in given.items() if value is not None}
    with Telemetry("build", run=options.out, part=str(part)) as telemetry:
        telemetry.start(options.metrics_port, options.metrics_address, options.push_gateway)
        source, description = open_source(options.kind, options.src, given)
        place.local_writable(options.out)
        print(f"{options.src}: listing", file=sys.stderr)
        listing = source.listing()
        print(f"{options.src}: {len(listing.items):,} pictures", file=sys.stderr)
        for note in listing.notes:
            print(f"note: {note}", file=sys.stderr)
        splits = ("train", "val") if options.val_fraction else ("all",)
        for split in splits:
            out = options.out if split == "all" else f"{options.out.rstrip('/')}/{split}"
            _build_one(options, source, listing, description, split, out, part, telemetry)


def _build_one(
    options: BuildOptions,
    source: Source,
    listing: Listing,
    description: dict[str, Any],
    split: str,
    out: str,
    part: Part,
    telemetry: Telemetry,
) -> None:
    selection = Selection(
        seed=options.seed,
        where=options.where,
        limit=options.limit,
        val_fraction=options.val_fraction,
        split=split,
    )
    recipe = _recipe(options)
    work = make_work(
        source,
        listing,
        description,
        selection,
        recipe,
        shard_bytes=options.shard_bytes,
        shard_images=options.shard_images,
    )
    if finished := place.prepare(out, work.plan, overwrite=options.overwrite):
        print(f"{out}: already built with these options, nothing to do ({finished.images:,} images)")
        return
    dataset = build.run(
        source,
        listing,
        work,
        recipe,
        location=options.src,
        out=out,
        workers=options.workers or available_cores(),
        part=part,
        max_bad=options.max_bad,
        telemetry=telemetry,
    )
    if dataset is None:
        print(f"{out}: part {part} is done. When all are: dcgan-data merge OUT PART…")
        return
    report(out, dataset)


def _recipe(options: BuildOptions) -> Recipe:
    """Return what decides the bytes of the images."""
    values: dict[str, Any] = {
        "size": options.size,
        "channels": options.channels,
        "encoding": options.encoding,
        "quality": options.quality or DEFAULT_QUALITY[options.encoding],
        "min_side": options.min_side,
    }
    given = {"min_face": options.min_face, "margin": options.margin, "model": options.model}
    given = {name: value for name, value in given.items() if value is not None}
    if options.kind != "faces":
        if given:
            raise UsageError(f"--{next(iter(given)).replace('_', '-')}: only for the source faces")
        return Recipe(**values)
    from pipeline.data.build.faces import FaceRecipe

    if options.model is not None:
        if not Path(options.model).is_file():
            raise UsageError(f"--model {options.model}: no such file; expected YuNet's ONNX file")
        given.update(detector="yunet", model_sha256=sha256_file(Path(options.model)))
    return FaceRecipe(**values, **{"min_face": options.size, **given})


def _write_sheet(out: str, dataset: Dataset) -> None:
    """Write a contact sheet of the faces beside the data set."""
    images = next(iterate(out, dataset=dataset, batch=240))
    Store(out).write(FACES_SHEET, encode(grid(images, 20), "png"))
    skipped = Store(out).path(place.SKIPPED) if Store(out).exists(place.SKIPPED) else None
    print(f"faces: {Store(out).path(FACES_SHEET)}" + (f"; pictures without: {skipped}" if skipped else ""))


def report(out: str, dataset: Dataset) -> None:
    """Say what a finished data set holds; of faces, show them too."""
    if dataset.source["kind"] == "faces":
        _write_sheet(out, dataset)
    print(
        f"{out}: {dataset.images:,} images of {dataset.image_size}x{dataset.image_size}x{dataset.channels} in "
        f"{len(dataset.shards):,} shards ({dataset.encoding}, {dataset.bytes / 1e6:,.1f} MB)"
    )
    if dataset.refused.count:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in dataset.refused.reasons.items())
        print(f"left out: {dataset.refused.count:,} ({reasons}); named in {out.rstrip('/')}/{place.REFUSED}")


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped("what is finished is kept; run the same command again to go on")
