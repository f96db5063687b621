"""`dcgan-data build`: opens the source, plans the build, runs it and prints the result."""

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.common.errors import UsageError, one_line
from pipeline.common.imaging import BadImage, encode, grid, has_window
from pipeline.common.machine import available_cores
from pipeline.common.partition import Partition, parse_partition
from pipeline.common.shapes.size import parse_size, refusal
from pipeline.common.storage import require_writable, sha256_file
from pipeline.common.telemetry import Telemetry
from pipeline.data.build import builder, state
from pipeline.data.build.options import CENTER, DEFAULT_MARGIN, DEFAULT_QUALITY, FACE, WHOLE, BuildOptions
from pipeline.data.build.plan import PlannedBuild, Selection, plan_build
from pipeline.data.build.transform import Recipe
from pipeline.data.dataset import Dataset
from pipeline.data.shard_reader import iterate
from pipeline.data.sources.interface import Items, Listing, Source, gathered, read_picture
from pipeline.data.sources.recognize import recognize
from pipeline.data.sources.registry import AUTO, open_source

WINDOW_PROBES = 16
"""Pictures that are looked at, to tell whether `--window` changes any."""


def build_all(options: BuildOptions) -> None:
    """Build OUT, or with a validation share OUT/train and OUT/val, and print the result.

    Nothing is written before everything that can be refused was checked.
    """
    part = parse_partition(options.part)
    if options.part is not None and options.overwrite:
        raise UsageError(
            f"--part {part} with --overwrite: every part would remove the shards of the others; run "
            f"`dcgan-data clear {options.out}` once, then the parts without --overwrite"
        )
    if options.kind == AUTO:
        options = _recognized(options)
    state.refuse_overlap(options.src, options.out)
    recipe = _recipe(options)
    given: dict[str, Any] = {
        "labels": options.labels,
        "all_files": options.all_files or None,
        "categories": options.categories or None,
        "split": options.source_split,
        "column": options.column,
        "config": options.config,
    }
    given = {name: value for name, value in given.items() if value is not None}
    with Telemetry("build", run=options.out, part=str(part)) as telemetry:
        telemetry.start(options.metrics_port, options.metrics_address, options.push_gateway)
        source, description = open_source(options.kind, options.src, given)
        require_writable(options.out)
        print(f"{options.src}: listing", file=sys.stderr)
        listing = source.listing()
        for folder in {os.path.dirname(file) or "." for file in listing.files}:
            state.refuse_overlap(folder, options.out)
        print(f"{options.src}: {len(listing.items):,} pictures", file=sys.stderr)
        for note in listing.notes:
            print(one_line(f"note: {note}"), file=sys.stderr)
        planned: dict[str, PlannedBuild] = {}
        for split in ("train", "val") if options.val_fraction else ("all",):
            out = options.out if split == "all" else f"{options.out.rstrip('/')}/{split}"
            selection = Selection(
                seed=options.seed,
                where=options.where,
                limit=options.limit,
                val_fraction=options.val_fraction,
                split=split,
            )
            planned[out] = plan_build(
                source,
                listing,
                description,
                selection,
                recipe,
                shard_bytes=options.shard_bytes,
                shard_images=options.shard_images,
            )
        if options.window:
            _check_window(options, source, planned)
        listing.items = Items()  # the plans hold the pictures, in their order
        finished = {out: state.prepare(out, one.plan, overwrite=options.overwrite) for out, one in planned.items()}
        for out, one in planned.items():
            if (there := finished[out]) is not None:
                print(f"{out}: already built with these options, nothing to do ({there.images:,} images)")
            else:
                _build_one(options, source, listing, one, recipe, out, part, telemetry)


def _recognized(options: BuildOptions) -> BuildOptions:
    """Return the options with the source that reads SRC, and say which it is."""
    kind, what = recognize(options.src)
    given = list(sys.argv[2:]) if sys.argv[1:2] == ["build"] and options.src in sys.argv else []
    if AUTO in given[: given.index(options.src)] if given else []:
        given.remove(AUTO)
    words = shlex.join(["dcgan-data", "build", kind, *given] if given else [kind])
    print(one_line(f"{options.src}: {what}. The same as: {words}"), file=sys.stderr)
    return replace(options, kind=kind)


def _check_window(options: BuildOptions, source: Source, planned: dict[str, PlannedBuild]) -> None:
    """Say that `--window` changes none of the first pictures; raise UsageError where it can change none at all."""
    probed = next(iter(planned.values())).pictures.slice(0, WINDOW_PROBES)
    encoded: set[bool] = set()
    with gathered(source, probed) as near:
        for item in probed:
            try:
                picture = read_picture(near, item)
                if has_window(picture):
                    return
            except BadImage:
                continue
            encoded.add(isinstance(picture, bytes))
    if not encoded:
        return  # the build says why none can be read
    if encoded == {False}:
        raise UsageError(f"--window {options.window}: has no effect on {options.src}, whose pixels have 8 bits")
    print(
        f"note: --window {options.window} changes none of the first {len(probed)} pictures: they have 8 bits, or color",
        file=sys.stderr,
    )


def _build_one(
    options: BuildOptions,
    source: Source,
    listing: Listing,
    planned: PlannedBuild,
    recipe: Recipe,
    out: str,
    part: Partition,
    telemetry: Telemetry,
) -> None:
    dataset = builder.run(
        source,
        listing,
        planned,
        recipe,
        location=options.src,
        out=out,
        workers=options.workers or available_cores(),
        part=part,
        max_bad=options.max_bad,
        telemetry=telemetry,
    )
    if dataset is None:
        print(f"{out}: part {part} is finished. When all parts are: dcgan-data merge OUT PART…")
        return
    report(dataset)


def _recipe(options: BuildOptions) -> Recipe:
    """Return the recipe of the images. Raises UsageError for options that the source does not use."""
    values: dict[str, Any] = {
        "size": options.size,
        "channels": options.channels,
        "encoding": options.encoding,
        "quality": options.quality or DEFAULT_QUALITY[options.encoding],
        "min_side": options.min_side,
        "fit": options.fit,
        "fill": options.fill,
        "window": options.window,
        "crop": _crop(options),
        "resize": options.resize,
        "all_frames": options.all_frames,
    }
    if options.encoding == "jpg" and options.channels == 4:
        raise UsageError("--encoding jpg with --channels 4: a JPEG has no transparency; use packed, png or webp")
    given = {"min_face": options.min_face, "margin": options.margin, "model": options.model}
    given = {name: value for name, value in given.items() if value is not None}
    if options.kind != "faces" and options.crop != FACE:
        if given:
            raise UsageError(f"--{next(iter(given)).replace('_', '-')}: applies to faces only; add --crop {FACE}")
        return Recipe(**values)
    for name, value in (("fit", options.fit.replace("crop", "")), ("crop", values["crop"])):
        if value:
            raise UsageError(f"--{name} {value}: a face is cropped; leave it out, or crop no faces")
    if options.all_frames:
        raise UsageError("--all-frames: has no effect on faces, which are looked for in the first frame")
    from pipeline.data.build.faces import FaceRecipe

    detector, model_sha256 = "haar", ""
    if options.model is not None:
        if not Path(options.model).is_file():
            raise UsageError(f"--model {options.model}: no such file; expected YuNet's ONNX file")
        detector, model_sha256 = "yunet", sha256_file(Path(options.model))
    values |= {"detector": detector, "model_sha256": model_sha256}
    return FaceRecipe(
        **values, **{"min_face": max(8, min(parse_size(options.size))), "margin": DEFAULT_MARGIN, **given}
    )


def _crop(options: BuildOptions) -> str:
    """Return the part of a picture that `--crop` takes. Raises UsageError where `--fit` says something else."""
    if options.crop == CENTER and options.fit != "crop":
        raise UsageError(f"--crop {CENTER}: --fit {options.fit} keeps the whole picture; leave one of them out")
    if options.crop == WHOLE and options.fit == "crop":
        raise UsageError(
            f"--crop {WHOLE}: a picture of another proportion becomes {options.size} with margins (--fit pad), or out "
            "of proportion (--fit stretch); add one of them"
        )
    return "" if options.crop in (CENTER, WHOLE, FACE) else options.crop


def report(dataset: Dataset) -> None:
    """Print what a finished data set holds; of faces, write a contact sheet as well."""
    if "detector" in dataset.source:
        _write_sheet(dataset)
    print(
        f"{dataset.location}: {dataset.images:,} images of {dataset.in_words} in "
        f"{len(dataset.shards):,} shards ({dataset.encoding}, {dataset.bytes / 1e6:,.1f} MB)"
    )
    width, height = parse_size(dataset.image_size)
    if problem := refusal(width, height):
        print(f"note: {problem}")
    if other := dataset.source.get("other_colors"):
        print(f"note: pictures with a color profile that cannot be used, taken as sRGB: {other:,}")
    if dataset.refused.count:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in dataset.refused.reasons.items())
        names = dataset.store.path(state.REFUSED)
        print(one_line(f"left out: {dataset.refused.count:,} ({reasons}); named in {names}"))


def _write_sheet(dataset: Dataset) -> None:
    """Write a contact sheet of the faces beside the data set."""
    store = dataset.store
    images = next(iterate(dataset, batch=240))
    store.write(state.FACES_SHEET, encode(grid(images, 20), "png"))
    skipped = store.path(state.SKIPPED) if store.exists(state.SKIPPED) else None
    print(f"faces: {store.path(state.FACES_SHEET)}" + (f"; pictures without faces: {skipped}" if skipped else ""))
