"""dcgan-data: make, check and look at data sets."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.common.command_line import command_group, run_command
from pipeline.common.errors import UsageError
from pipeline.common.telemetry import MetricsAddress, MetricsPort, PushGateway

app = command_group(help="Make data sets of images, check them and look at them.")


class SourceKind(StrEnum):
    """What SRC is."""

    folder = "folder"
    lsun = "lsun"
    celeba = "celeba"
    cifar10 = "cifar10"
    svhn = "svhn"
    imagenet = "imagenet"
    ffhq = "ffhq"
    webdataset = "webdataset"
    faces = "faces"


class EncodingName(StrEnum):
    """How images are stored."""

    packed = "packed"
    jpg = "jpg"
    webp = "webp"
    png = "png"


Location = Annotated[str, typer.Argument(metavar="DATA", help="A data set: its folder or URL.")]


@app.command()
def build(
    kind: Annotated[SourceKind, typer.Argument(metavar="SOURCE", help="What SRC is: " + ", ".join(SourceKind))],
    src: Annotated[str, typer.Argument(metavar="SRC", help="Folder, file or URL of the pictures.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of the data set to make.")],
    size: Annotated[int, typer.Option(min=4, max=4096, help="Height and width of the images in pixels.")] = 64,
    channels: Annotated[int, typer.Option(min=1, max=3, help="3 for RGB, 1 for gray.")] = 3,
    encoding: Annotated[EncodingName, typer.Option(help="packed: raw pixels in blocks, lossless and fastest.")] = (
        EncodingName.packed
    ),
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Of jpg (default 95) and webp (92; 100 is lossless).")
    ] = None,
    min_side: Annotated[int, typer.Option(min=1, help="Refuse pictures with a shorter side below this.")] = 1,
    labels: Annotated[
        str | None,
        typer.Option(help="folder: 'folders' (the default: the first folder is the class), 'none', or a CSV file."),
    ] = None,
    category: Annotated[list[str] | None, typer.Option(help="lsun: only this category; may be repeated.")] = None,
    split: Annotated[str | None, typer.Option(help="The source's own split, such as train, val, test.")] = None,
    min_face: Annotated[
        int | None, typer.Option(min=8, help="faces: skip smaller ones, in pixels; default: --size.")
    ] = None,
    margin: Annotated[
        float | None, typer.Option(min=0, max=2, help="faces: share of the face added on each side; default 0.25.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="faces: YuNet's ONNX file, used instead of OpenCV's Haar cascade.")
    ] = None,
    where: Annotated[list[str] | None, typer.Option(help="Only pictures such as male=1 or yaw<10; repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many pictures, drawn at random.")] = None,
    val_fraction: Annotated[
        float, typer.Option(min=0, max=0.9, help="Build OUT/train and OUT/val, with this share in val.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Decides the order, and what --limit and --val-fraction take.")] = 0,
    shard_bytes: Annotated[int, typer.Option(min=65536, help="No shard is larger.")] = 32_000_000,
    shard_images: Annotated[int | None, typer.Option(min=1, help="Images a shard; default: as many as fit.")] = None,
    max_bad: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of pictures that may be unusable.  [default: 0.01]")
    ] = None,
    part: Annotated[str | None, typer.Option(help="Build only part i/N (from 0); then `dcgan-data merge`.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another data set in OUT.")] = False,
    metrics_port: MetricsPort = None,
    metrics_address: MetricsAddress = "127.0.0.1",
    push_gateway: PushGateway = None,
) -> None:
    """Turn the pictures in SRC into the data set OUT. Interrupted, the same command goes on."""
    from pipeline.data.build.command import BuildOptions, build_all

    if channels == 2:
        raise UsageError("--channels 2: expected 1 (gray) or 3 (RGB)")
    build_all(
        BuildOptions(
            kind=kind.value,
            src=src,
            out=out,
            size=size,
            channels=channels,
            encoding=encoding.value,
            quality=quality,
            min_side=min_side,
            labels=labels,
            categories=tuple(category or ()),
            source_split=split,
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
def merge(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of the data set to finish.")],
    parts: Annotated[list[str] | None, typer.Argument(metavar="[PART]...", help="Folders of the parts.")] = None,
    max_bad: Annotated[float | None, typer.Option(min=0, max=1, help="As for build.")] = None,
) -> None:
    """Bring the parts of a build together: the same bytes as building it whole."""
    from pipeline.data.build.builder import merge as merge_parts
    from pipeline.data.build.command import report

    report(out, merge_parts(out, parts or [], max_bad=max_bad))


@app.command()
def dedup(
    src: Annotated[str, typer.Argument(metavar="IN", help="The data set with duplicates: its folder or URL.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of the data set without them.")],
    radius: Annotated[int, typer.Option(min=0, max=32, help="Drop what differs in at most so many of 128 bits.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the hash's training.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another data set in OUT.")] = False,
) -> None:
    """Copy a data set without near-duplicates, found by the paper's semantic hash, and report them."""
    from pipeline.common.machine import available_cores
    from pipeline.data.build.command import report
    from pipeline.data.dedup.dedup import dedup as copy_without

    processes = workers or available_cores()
    report(out, copy_without(src, out, radius=radius, seed=seed, workers=processes, overwrite=overwrite))


@app.command()
def verify(out: Location) -> None:
    """Check every shard, image and label of a data set, and name what is damaged."""
    from pipeline.data.verify import verify as check

    check(out)


@app.command()
def show(
    out: Location,
    sheet: Annotated[
        Path | None, typer.Option("--out", "--sheet", help="Where the contact sheet goes; default: sheet.png in it.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, max=10_000, help="Images on the sheet.")] = 96,
) -> None:
    """Print a data set's numbers and write a contact sheet."""
    from pipeline.data.show import show as present

    present(out, sheet, images)


def main() -> None:
    """Run the command line."""
    run_command(app)
