"""dcgan-data: builds, checks and shows data sets."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from typer.core import TyperCommand

from pipeline.common.command_line import command_group, run_command
from pipeline.common.errors import UsageError
from pipeline.common.shapes.size import Channels as ChannelCount
from pipeline.common.shapes.size import parse_size, written
from pipeline.common.telemetry import MetricsAddress, MetricsPort, PushGateway
from pipeline.data.build.options import (
    CENTER,
    DEFAULT_MARGIN,
    DEFAULT_MAX_BAD,
    DEFAULT_QUALITY,
    FACE,
    LARGEST_SEED,
    WHOLE,
    BuildOptions,
)
from pipeline.data.sources.registry import AUTO, SOURCES

app = command_group(help="Build data sets of images, check them and show them.")


class EncodingName(StrEnum):
    """Formats of stored images."""

    packed = "packed"
    jpg = "jpg"
    webp = "webp"
    png = "png"


Location = Annotated[str, typer.Argument(metavar="DATA", help="Folder or URL of a data set, or the name of tars.")]


def _size(value: str) -> str:
    """Return `--size`, checked."""
    try:
        sides = parse_size(value)
    except ValueError as error:
        raise typer.BadParameter(f"{value}: {error}") from None
    if not (min(sides) >= SMALLEST_SIDE and max(sides) <= LARGEST_SIDE):
        raise typer.BadParameter(f"{value}: expected sides of {SMALLEST_SIDE} to {LARGEST_SIDE} pixels")
    return value


def _channels(value: int) -> int:
    """Return `--channels`, checked."""
    if value not in get_args(ChannelCount):
        raise typer.BadParameter(f"{value}: expected 1 (gray), 3 (RGB) or 4 (RGBA)")
    return value


def _fill(value: str) -> str:
    """Return `--fill`, checked."""
    if value in ("", "edge"):
        return value
    from pipeline.common.shapes.frame import check_fill

    try:
        return check_fill(value)
    except ValueError as error:
        raise typer.BadParameter(f"{value}: {error}") from None


def _crop(value: str) -> str:
    """Return `--crop`, checked."""
    if value in ("", CENTER, WHOLE, FACE):
        return value
    from pipeline.common.shapes.crop import check_crop

    try:
        return check_crop(value)
    except ValueError as error:
        raise typer.BadParameter(f"{value}: {error}, {CENTER}, {WHOLE} or {FACE}") from None


def _window(value: str) -> str:
    """Return `--window`, checked."""
    if not value:
        return value
    from pipeline.common.pictures.window import check_window

    try:
        return check_window(value)
    except ValueError as error:
        raise typer.BadParameter(f"{value}: {error}") from None


SMALLEST_SIDE, LARGEST_SIDE = 4, 4096


class FitName(StrEnum):
    """How a picture of another proportion becomes an image."""

    crop = "crop"
    pad = "pad"
    stretch = "stretch"


class ResizeName(StrEnum):
    """How pixels are added and removed."""

    lanczos = "lanczos"
    area = "area"


Size = Annotated[
    str, typer.Option(metavar="SIZE", callback=_size, help="Pixels: 64 is a square, 96x64 is width x height.")
]
Channels = Annotated[
    int,
    typer.Option(metavar="1|3|4", callback=_channels, help="1 for gray, 3 for RGB, 4 for RGBA with transparency."),
]
FitOption = Annotated[
    FitName,
    typer.Option(
        "--fit",
        help="Pictures of another proportion: crop the middle, pad the whole picture with margins, or stretch it.",
    ),
]
Fill = Annotated[
    str,
    typer.Option(
        metavar="COLOR|edge",
        callback=_fill,
        help="Margins of --fit pad: a color such as white or #102030, or edge to repeat the outermost pixels.  "
        "[default: black; of RGBA transparent]",
        show_default=False,
    ),
]
MinSide = Annotated[int, typer.Option(min=1, help="Refuse pictures whose shorter side has fewer pixels.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Worker processes; default: one a core.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another data set in OUT.")]
MaxBad = Annotated[
    float | None,
    typer.Option(min=0, max=1, help=f"Largest share of pictures that may be unusable.  [default: {DEFAULT_MAX_BAD}]"),
]


def _check_fill(fit: FitName, fill: str) -> None:
    """Raise UsageError for a fill that would be ignored."""
    if fill and fit is not FitName.pad:
        raise UsageError(f"--fill {fill}: applies to --fit pad only, which gives pictures margins")


def _places(first: str, second: str, third: str) -> tuple[str, str, str]:
    """Return SOURCE, SRC and OUT of the words that were given. Of two words SOURCE is auto. Raises UsageError."""
    known = (AUTO, *SOURCES)
    if third:
        if first not in known:
            raise UsageError(f"SOURCE {first}: is not one of {', '.join(known)}")
        return first, second, third
    if not second:
        raise UsageError("build: words are missing; expected SRC OUT, or SOURCE SRC OUT; --help explains them")
    if first in known:
        raise UsageError(f"build {first} {second}: OUT is missing; if SRC is a folder named {first}, write ./{first}")
    return AUTO, first, second


class _Build(TyperCommand):
    """Says how the words of `build` are given: the first may be left out, which no argument of its own could be."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what follows the name of the command."""
        return ["[OPTIONS]", "[SOURCE]", "SRC", "OUT"]


@app.command(cls=_Build)
def build(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            autocompletion=lambda: [AUTO, *SOURCES],
            help=f"What SRC is: {', '.join(SOURCES)}. auto, or left out: recognized, with the command that it stands "
            "for.",
            show_default=False,
        ),
    ] = "",
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Folder, archive (zip, tar), file or URL of pictures. webdataset: also {0..9}, a glob, ::, @list.txt. "
            "huggingface: also the name of a data set on the Hub.",
            show_default=False,
        ),
    ] = "",
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Folder or URL of the new data set.", show_default=False)
    ] = "",
    size: Size = str(BuildOptions.size),
    channels: Channels = BuildOptions.channels,
    encoding: Annotated[
        EncodingName, typer.Option(help="Format of the stored images. packed: raw pixels in blocks, lossless, fastest.")
    ] = EncodingName(BuildOptions.encoding),
    quality: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100,
            help=f"Quality of jpg (default {DEFAULT_QUALITY['jpg']}) and "
            f"webp (default {DEFAULT_QUALITY['webp']}; 100 is lossless).",
        ),
    ] = BuildOptions.quality,
    min_side: MinSide = BuildOptions.min_side,
    fit: FitOption = FitName(BuildOptions.fit),
    fill: Fill = BuildOptions.fill,
    crop: Annotated[
        str,
        typer.Option(
            metavar="center|none|face|X,Y,W,H|NAME",
            callback=_crop,
            help="Part of a picture that is taken first: a box in pixels from its upper left corner, or one of "
            "CelebA's usual ones: celeba-108, celeba-128, celeba-148. none: all of it, with --fit pad or stretch. "
            "face: every face in it, with a margin.  [default: center]",
            show_default=False,
        ),
    ] = BuildOptions.crop,
    resize: Annotated[
        ResizeName, typer.Option(help="Filter: lanczos is sharper, area takes the mean of what a pixel covers.")
    ] = ResizeName(BuildOptions.resize),
    all_frames: Annotated[
        bool,
        typer.Option(
            "--all-frames",
            help="Every page of a TIFF, every frame of an animation (GIF, WebP, PNG, AVIF) and of a DICOM file; "
            "without it the first.",
        ),
    ] = BuildOptions.all_frames,
    window: Annotated[
        str,
        typer.Option(
            metavar="LO,HI|percentile:LO,HI|file",
            callback=_window,
            help="Values of 16-bit and floating-point pictures that become black and white: two numbers, two "
            "percentiles of each picture, or the window that a DICOM file states.",
        ),
    ] = BuildOptions.window,
    labels: Annotated[
        str | None,
        typer.Option(
            help="folder, faces: 'folders' (a picture's first folder is its class), 'none', or a table (CSV, JSON "
            "lines, parquet). Default: folders, and metadata.csv, .jsonl or .parquet beside the pictures."
        ),
    ] = BuildOptions.labels,
    all_files: Annotated[
        bool,
        typer.Option(
            "--all-files",
            help="folder, faces at a URL: look into files without a picture's suffix, too; a request each.",
        ),
    ] = BuildOptions.all_files,
    category: Annotated[list[str] | None, typer.Option(help="lsun: only this category; repeatable.")] = None,
    split: Annotated[str | None, typer.Option(help="The source's own split: for example train, val, test.")] = (
        BuildOptions.source_split
    ),
    column: Annotated[
        str | None, typer.Option(help="parquet, huggingface: the column of the pictures, where several could be.")
    ] = BuildOptions.column,
    config: Annotated[
        str | None, typer.Option(help="huggingface: the configuration, where the data set has several.")
    ] = BuildOptions.config,
    min_face: Annotated[
        int | None, typer.Option(min=8, help="--crop face: skip faces with fewer pixels a side; default: --size.")
    ] = BuildOptions.min_face,
    margin: Annotated[
        float | None,
        typer.Option(
            min=0, max=2, help=f"--crop face: margin on each side, as a share of the face; default {DEFAULT_MARGIN}."
        ),
    ] = BuildOptions.margin,
    model: Annotated[
        str | None, typer.Option(help="--crop face: YuNet's ONNX file; default: OpenCV's Haar cascade.")
    ] = BuildOptions.model,
    where: Annotated[
        list[str] | None, typer.Option(help="Only pictures whose labels match: for example male=1, yaw<10; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Largest number of pictures, drawn at random.")] = (
        BuildOptions.limit
    ),
    val_fraction: Annotated[
        float, typer.Option(min=0, max=0.9, help="Build OUT/train and OUT/val, with this share in OUT/val.")
    ] = BuildOptions.val_fraction,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=LARGEST_SEED, help="Seed of the order, and so of what --limit and --val-fraction take."
        ),
    ] = BuildOptions.seed,
    shard_bytes: Annotated[int, typer.Option(min=65536, help="Largest size of a shard in bytes.")] = (
        BuildOptions.shard_bytes
    ),
    shard_images: Annotated[int | None, typer.Option(min=1, help="Images a shard; default: as many as fit.")] = (
        BuildOptions.shard_images
    ),
    max_bad: MaxBad = BuildOptions.max_bad,
    part: Annotated[
        str | None, typer.Option(help="Build only part i of N, as i/N, counted from 0; `dcgan-data merge` joins them.")
    ] = BuildOptions.part,
    workers: Workers = BuildOptions.workers,
    overwrite: Overwrite = BuildOptions.overwrite,
    metrics_port: MetricsPort = BuildOptions.metrics_port,
    metrics_address: MetricsAddress = BuildOptions.metrics_address,
    push_gateway: PushGateway = BuildOptions.push_gateway,
) -> None:
    """Turn the pictures in SRC into the data set OUT. After an interruption, run the same command to resume."""
    from pipeline.data.build.command import build_all

    kind, src, out = _places(kind, src, out)
    _check_fill(fit, fill)
    build_all(
        BuildOptions(
            kind=kind,
            src=src,
            out=out,
            size=written(*parse_size(size)),
            channels=cast(ChannelCount, channels),
            encoding=encoding.value,
            quality=quality,
            min_side=min_side,
            fit=fit.value,
            fill=fill,
            window=window,
            crop=crop,
            resize=resize.value,
            all_frames=all_frames,
            labels=labels,
            all_files=all_files,
            categories=tuple(category or ()),
            source_split=split,
            column=column,
            config=config,
            where=tuple(where or ()),
            limit=limit,
            val_fraction=val_fraction,
            seed=seed,
            shard_bytes=shard_bytes,
            shard_images=shard_images,
            max_bad=max_bad,
            part=part,
            workers=workers,
            overwrite=overwrite,
            min_face=min_face,
            margin=margin,
            model=model,
            metrics_port=metrics_port,
            metrics_address=metrics_address,
            push_gateway=push_gateway,
        )
    )


@app.command()
def index(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="SPEC",
            help="WebDataset tars: a folder, a tar, braces {000..123}, a glob, @list.txt, URLs of these.",
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of the index: a new data set.")],
    size: Size = str(BuildOptions.size),
    channels: Channels = BuildOptions.channels,
    min_side: MinSide = BuildOptions.min_side,
    fit: FitOption = FitName(BuildOptions.fit),
    fill: Fill = BuildOptions.fill,
    max_bad: MaxBad = BuildOptions.max_bad,
    part: Annotated[
        str | None, typer.Option(help="Index only part i of N, as i/N, counted from 0; `dcgan-data merge` joins them.")
    ] = BuildOptions.part,
    workers: Workers = BuildOptions.workers,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another index in OUT.")] = False,
    metrics_port: MetricsPort = BuildOptions.metrics_port,
    metrics_address: MetricsAddress = BuildOptions.metrics_address,
    push_gateway: PushGateway = BuildOptions.push_gateway,
) -> None:
    """Make a data set of WebDataset tars where they lie: no pixel is copied. Run it again to resume."""
    from pipeline.data.build.process_pool import start_server
    from pipeline.data.specification import expand

    _check_fill(fit, fill)
    tars = expand(spec)
    if workers != 1:
        start_server("pipeline.data.index.indexer")  # which imports while this process does

    from pipeline.data.index.command import IndexOptions
    from pipeline.data.index.command import index as index_tars

    index_tars(
        IndexOptions(
            spec=spec,
            tars=tars,
            out=out,
            size=written(*parse_size(size)),
            channels=cast(ChannelCount, channels),
            min_side=min_side,
            fit=fit.value,
            fill=fill,
            max_bad=max_bad,
            part=part,
            workers=workers,
            overwrite=overwrite,
            metrics_port=metrics_port,
            metrics_address=metrics_address,
            push_gateway=push_gateway,
        )
    )


@app.command()
def merge(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of the data set to finish.")],
    parts: Annotated[
        list[str] | None, typer.Argument(metavar="[PART]...", help="Folders or URLs of the parts; default: OUT.")
    ] = None,
    max_bad: MaxBad = BuildOptions.max_bad,
) -> None:
    """Join the parts of a build or of an index. The result has the same bytes as without --part."""
    from pipeline.data.build import builder
    from pipeline.data.build.command import report
    from pipeline.data.index import command, indexer

    if command.is_index(out, parts or []):
        command.report(indexer.merge(out, parts or [], max_bad=max_bad))
    else:
        report(builder.merge(out, parts or [], max_bad=max_bad))


class FormName(StrEnum):
    """What `convert` writes."""

    folder = "folder"
    zip = "zip"
    parquet = "parquet"


@app.command()
def convert(
    data: Location,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="New folder or zip on a disk.")],
    to: Annotated[
        FormName,
        typer.Option(
            help="folder: pictures and metadata.jsonl; zip: the same, in one file; parquet: as Hugging Face has it."
        ),
    ] = FormName.folder,
) -> None:
    """Write a data set in a form that other programs read. Encoded images stay as they are, pixels become PNGs."""
    from pipeline.data.build.state import refuse_overlap
    from pipeline.data.convert import convert as write
    from pipeline.data.index.command import data_set

    with data_set(data) as dataset:
        refuse_overlap(data, target)
        write(dataset, target, to.value)


@app.command()
def clear(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of a data set, or of an unfinished build.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a data set or an unfinished build. Only what a build or dedup wrote goes; other files stay."""
    from pipeline.data.build.clear import clear as remove
    from pipeline.data.build.clear import describe, find_builds

    places = find_builds(out)
    for place in places:
        what = describe(place)
        if not yes and not sys.stdin.isatty():
            raise UsageError(f"{what}: nobody is there to be asked; add --yes to remove it")
        if not yes and not typer.confirm(f"Remove {what}?"):
            raise UsageError(f"{place}: not removed")
        remove(place, out)
        print(f"removed {what}")
    if not places:
        print(f"{out}: nothing to remove")


@app.command()
def dedup(
    src: Annotated[str, typer.Argument(metavar="IN", help="Folder or URL of the data set with duplicates.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of the data set without duplicates.")],
    radius: Annotated[
        int, typer.Option(min=0, max=32, help="Drop images whose 128-bit hashes differ in at most this many bits.")
    ] = 8,  # of the bundled faces, which are distinct, it drops one of 5,000; docs/data.md has the measurement
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the hash's training.")] = 0,
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Copy a data set without near-duplicates, found by the paper's semantic hash, and report them."""
    from pipeline.common.machine import available_cores
    from pipeline.data.build.command import report
    from pipeline.data.build.state import refuse_overlap
    from pipeline.data.dataset import open_dataset
    from pipeline.data.dedup.dedup import dedup as copy_without_duplicates

    refuse_overlap(src, out)  # before anything is read
    processes = workers or available_cores()
    report(
        copy_without_duplicates(
            open_dataset(src), out, radius=radius, seed=seed, workers=processes, overwrite=overwrite
        )
    )


@app.command()
def verify(data: Location) -> None:
    """Check every shard, image and label of a data set, and name what is damaged."""
    from pipeline.data.index.command import data_set
    from pipeline.data.verify import verify as check

    with data_set(data) as dataset:
        check(dataset)


@app.command()
def show(
    data: Location,
    sheet: Annotated[
        Path | None,
        typer.Option("--out", "--sheet", help="Path of the contact sheet; default: DATA/sheet.png, of tars sheet.png."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, max=10_000, help="Images on the sheet.")] = 96,
    label: Annotated[
        str | None,
        typer.Option(help="Count the images of each class of this label, or of each combination of male,eyeglasses."),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Also write one page: classes, sizes before resizing, what was left out and why, equal images.",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="With --html: what was built, to show the pictures that were left out."),
    ] = None,
) -> None:
    """Print a data set's numbers, write a contact sheet, and with --html a page."""
    from pipeline.data.index.command import data_set
    from pipeline.data.show import show as present
    from pipeline.data.specification import is_specification

    if source is not None and page is None:
        raise UsageError(f"--source {source}: applies to --html only, which shows pictures that were left out")
    if sheet is None and is_specification(data):
        sheet = Path("sheet.png")
    with data_set(data) as dataset:
        present(dataset, sheet, images, tuple(label.split(",")) if label else ())
        if page is not None:
            from pipeline.data.page import write_page

            write_page(dataset, page, images, source)
            print(f"page: {page}")


def main() -> None:
    """Run the command line."""
    run_command(app)
