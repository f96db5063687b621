"""dcgan-generate: sample any number of images from a model, into shards that training and evaluation can read.

    dcgan-generate --model model.onnx --count 1000000 --out samples/
    dcgan-generate --model model.onnx --count 1000000 --out s3://bucket/samples --part 3/20
    dcgan-generate --model model.onnx --count 64 --out pictures/ --format png --layout folder --sheet 8x8
    dcgan-generate merge s3://bucket/samples

Image i depends on the model, the seed and i alone. An interrupted command resumes when it is run again.
"""

import math
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.common.command_line import Version, plain_app, run_command
from pipeline.common.errors import DataError, Stopped, TryAgainError, UnavailableError, UsageError
from pipeline.common.telemetry import MetricsAddress, MetricsPort, PushGateway

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deploy.generation.plan import Plan, ShardRange
    from export.samplers.base import Sampler
    from pipeline.common.progress import Progress
    from pipeline.common.storage import Store
    from pipeline.common.telemetry import Telemetry

MOST_SHEET_IMAGES = 10_000
SHEET = "sheet.png"

app = plain_app()


class Format(StrEnum):
    """Choices of --format."""

    webp = "webp"
    jpg = "jpg"
    png = "png"
    packed = "packed"


class LabelDraw(StrEnum):
    """Choices of --labels."""

    balanced = "balanced"
    as_trained = "as-trained"


class Layout(StrEnum):
    """Choices of --layout."""

    shards = "shards"
    folder = "folder"


@app.callback(invoke_without_command=True)
def generate(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A .onnx file, a TensorRT engine (.plan), or any form of --ckpt.")] = "",
    count: Annotated[int, typer.Option(help="Images to make.")] = 0,
    out: Annotated[str, typer.Option(help="Folder or URL (s3://, gs://) for the shards.")] = "",
    start: Annotated[int, typer.Option(help="Index of the first image.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the latents.")] = 0,
    format: Annotated[Format, typer.Option(help="Encoding; packed is uncompressed uint8.")] = Format.webp,
    quality: Annotated[int, typer.Option(help="Quality of jpg and webp, 1 to 100; webp is lossless at 100.")] = 90,
    layout: Annotated[
        Layout, typer.Option(help="shards, which programs read; folder: plain files, 000000.png and so on.")
    ] = Layout.shards,
    sheet: Annotated[
        str | None, typer.Option(help="ROWSxCOLUMNS: also one contact sheet of the first images, OUT/sheet.png.")
    ] = None,
    latents: Annotated[
        str | None, typer.Option(help="The z of the images: a .npy of float32 (images, latent_dim); path or URL.")
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Class of a conditional model's images, or several in turn: 7; 3,5; smiling; male+bald."),
    ] = None,
    labels: Annotated[
        LabelDraw | None,
        typer.Option(help="balanced: every class in turn; as-trained (default): as often as the training set has it."),
    ] = None,
    restore_aspect: Annotated[
        bool,
        typer.Option(
            "--restore-aspect", help="Give images the proportion of the pictures, which --fit stretch took from them."
        ),
    ] = False,
    part: Annotated[
        str | None,
        typer.Option(help="i/N makes part i of N, from 0; N alone takes i from the index of a pod or array."),
    ] = None,
    shard_images: Annotated[
        int | None, typer.Option(help="Images in a shard. Default: the largest power of two that stays under 32 MB.")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, openvino, onnxruntime, eager, compiled, ...")] = "auto",
    batch: Annotated[int | None, typer.Option(help="Images in a block. Default: 256 on a GPU, 64 on the CPU.")] = None,
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="Rebuild an engine that does not fit here, from the ONNX file beside it."),
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Threads of a sampler on the CPU. Default: one a core.")] = None,
    encoders: Annotated[int | None, typer.Option(help="Processes that encode. Default: one a core.")] = None,
    metrics_port: MetricsPort = None,
    metrics_address: MetricsAddress = "127.0.0.1",
    push_gateway: PushGateway = None,
    version: Version = False,
) -> None:
    """Sample images START to START + COUNT - 1 from a model. `merge` joins the parts of several runs."""
    if context.invoked_subcommand is not None:
        return
    rows, columns = _sheet_of(sheet)
    given = None if latents is None else _read_latents(latents, start)
    count = count or (rows * columns if given is None else len(given))
    for name, value in (("--model", model), ("--count", count), ("--out", out)):
        if not value:
            raise UsageError(f"{name} is missing; see dcgan-generate --help")
    for name, number, low, high in (
        ("--count", count, 1, 2**48),
        ("--start", start, 0, 2**48),
        ("--seed", seed, 0, 2**64 - 1),
        ("--quality", quality, 1, 100),
        ("--shard-images", shard_images, 1, 2**24),
        ("--batch", batch, 1, 2**20),
        ("--threads", threads, 1, 4096),
        ("--encoders", encoders, 1, 4096),
    ):
        if number is not None and not low <= number <= high:
            raise UsageError(f"{name} {number}: expected {low} to {high}")
    if given is not None and count > len(given):
        raise UsageError(f"--count {count}: --latents {latents} holds {len(given)} z")
    if rows * columns > count:
        raise UsageError(f"--sheet {sheet}: {rows * columns} images, but --count is {count}")
    if label is not None and labels is not None:
        raise UsageError(f"--label {label} --labels {labels.value}: choose one of the two")
    if layout is Layout.folder and format is Format.packed:
        raise UsageError("--layout folder: packed images have no files of their own; choose --format png, jpg or webp")
    from pipeline.common.machine import available_cores
    from pipeline.common.partition import parse_partition
    from pipeline.common.telemetry import Telemetry

    mine = parse_partition(part)
    with Telemetry("generate", run=out, part=str(mine)) as telemetry:
        telemetry.set("dcgan_generate_model_refused", 0)
        telemetry.start(metrics_port, metrics_address, push_gateway)
        with _stop_on_signals() as stop:
            _generate(
                model=model,
                rebuild=rebuild,
                out=out,
                part=mine,
                backend=backend,
                batch=batch,
                threads=threads,
                encoders=encoders or available_cores(),
                stop=stop,
                telemetry=telemetry,
                given=None if given is None else given[:count],
                sheet=(rows, columns),
                restore_aspect=restore_aspect,
                choices={
                    "layout": None if layout is Layout.shards else layout.value,
                    "seed": seed,
                    "start": start,
                    "count": count,
                    "format": format.value,
                    "quality": quality if format in (Format.jpg, Format.webp) else None,
                    "shard_images": shard_images,
                    "label": label,
                    "labels": None if labels is None else labels.value,
                },
            )


@app.command()
def merge(
    out: Annotated[str, typer.Argument(help="The --out that the parts share.")],
    quick: Annotated[
        bool, typer.Option(help="Trust the records; do not read every shard and compare its hash.")
    ] = False,
) -> None:
    """Verify every shard, write manifest.json and dataset.json, and remove the files that are no longer needed.

    The part that finishes last has written both files already. Run this when no part runs any more, to verify them.
    """
    from deploy.generation.folder import is_folder, merge_folder
    from deploy.generation.manifest import MANIFEST, merge
    from pipeline.common.storage import Store

    store = Store(out)
    if is_folder(store):
        pictures = merge_folder(store, verify=not quick, tidy=True)
        print(f"{pictures.images:,} pictures, {pictures.bytes:,} bytes: {store.path(MANIFEST)}")
        return
    manifest = merge(store, verify=not quick, tidy=True)
    print(
        f"{manifest.images:,} images in {len(manifest.shards):,} shards, {manifest.bytes:,} bytes, "
        f"all of model {manifest.plan.model_sha256[:12]}: {store.path(MANIFEST)}"
    )


def main() -> None:
    """Entry point of dcgan-generate."""
    run_command(app)


def _generate(
    *,
    model: str,
    out: str,
    part: Any,
    rebuild: bool,
    backend: str,
    batch: int | None,
    threads: int | None,
    encoders: int,
    stop: threading.Event,
    telemetry: "Telemetry",
    given: "NDArray[np.float32] | None",
    sheet: tuple[int, int],
    restore_aspect: bool,
    choices: dict[str, Any],
) -> None:
    """Make the shards or pictures of this part, and merge if none of another part is missing."""
    from deploy.generation.folder import begin_folder, merge_folder, unfinished_pictures
    from deploy.generation.manifest import begin, merge, missing, unfinished
    from pipeline.common.progress import Progress
    from pipeline.common.storage import Store, require_writable

    store = Store(out)
    require_writable(out)
    try:
        if rebuild:
            from export.builders.engine import rebuild_unless_it_fits

            rebuild_unless_it_fits(model)
        sampler = _open(store, model, backend=backend, batch=batch, threads=threads)
    except (DataError, UnavailableError):
        telemetry.set("dcgan_generate_model_refused", 1)
        raise
    with sampler:
        size = _restored(sampler) if restore_aspect else sampler.image_size
        plan = _plan(sampler, choices | {"image_size": size}, given)
        folder = plan.layout == "folder"
        finished_before = (begin_folder if folder else begin)(store, plan)
        if part.index == 0:
            _write_sheet(store, sampler, plan, given, *sheet)
        if finished_before:
            return _report(store, plan, 0, 0.0)
        shards = plan.shards()
        mine = [shards[position] for position in part.slice(len(shards))]
        todo = (unfinished_pictures if folder else unfinished)(store, plan, mine)
        total, left = sum(shard.images for shard in mine), sum(shard.images for shard in todo)
        telemetry.set("dcgan_generate_info", 1, backend=sampler.backend, provider=sampler.provider, format=plan.format)
        telemetry.set("dcgan_generate_target_images", total)
        telemetry.add("dcgan_generate_skipped_images_total", total - left)
        telemetry.set("dcgan_generate_last_shard_timestamp_seconds", time.time())
        began = time.monotonic()
        with Progress(f"part {part}" if part.count > 1 else "generating", total, done=total - left) as progress:
            make = _make_pictures if folder else _make_shards
            made = make(sampler, store, plan, todo, given, encoders, stop, telemetry, progress)
    if made < left:
        what = "pictures" if folder else "shards"
        raise Stopped(f"{store.location}: finished {what} are kept; run the same command again to resume")
    if folder:
        with suppress(TryAgainError):  # other parts have not made theirs yet
            merge_folder(store, tidy=part.count == 1)
    elif missing(store, plan)[1] is None:
        merge(store)  # does not tidy: a retry of the same part may still be writing
    _report(store, plan, left, time.monotonic() - began)


def _open(store: "Store", model: str, *, backend: str, batch: int | None, threads: int | None) -> "Sampler":
    """Open the sampler of this part. Of a generation that has begun, `auto` is what its plan says.

    So machines on which other backends are the fastest make one generation together.
    """
    from deploy.generation.folder import begun
    from export.samplers.open import backends_of, open_sampler

    plan = None
    if backend == "auto":
        with suppress(DataError):  # of what is damaged, or not ours, `begin` says more
            plan = begun(store)
    if plan is None or plan.backend not in backends_of(model):  # what does not fit is refused when the plans differ
        sampler = open_sampler(model, backend=backend, batch=batch, threads=threads)
        if sampler.chosen_because:
            print(f"backend {sampler.backend}: {sampler.chosen_because}")
        return sampler
    try:
        sampler = open_sampler(model, backend=plan.backend, batch=batch or plan.block_images, threads=threads)
    except UnavailableError as error:
        raise UnavailableError(f"{store.location}: was begun with --backend {plan.backend}: {error}") from None
    print(f"backend {sampler.backend}, {sampler.batch} images a block: as this generation was begun")
    return sampler


def _make_shards(
    sampler: "Sampler",
    store: "Store",
    plan: "Plan",
    todo: "list[ShardRange]",
    given: "NDArray[np.float32] | None",
    encoders: int,
    stop: threading.Event,
    telemetry: "Telemetry",
    progress: "Progress",
) -> int:
    """Make the shards `todo` and return how many images they hold, fewer when it was stopped."""
    from deploy.generation.folder import require_same_plan
    from deploy.generation.manifest import finish_shard
    from deploy.generation.pipeline import generate_shards

    provenance = _provenance(sampler)
    finished: list[int] = []

    def finish(shard: Any, writer: Any) -> None:
        if not finished:
            require_same_plan(store, plan)
        record = finish_shard(store, plan, shard, writer, provenance)
        finished.append(shard.images)
        telemetry.add("dcgan_generate_written_bytes_total", record.shard.bytes)
        telemetry.set("dcgan_generate_last_shard_timestamp_seconds", time.time())

    def report_time(phase: str, seconds: float) -> None:
        telemetry.add("dcgan_generate_phase_seconds_total", seconds, phase=phase)

    def report_images(images: int) -> None:
        progress.advance(images)
        telemetry.add("dcgan_generate_images_total", images)

    generate_shards(
        sampler,
        plan,
        todo,
        finish,
        encoders=encoders,
        stop=stop,
        given=given,
        report_time=report_time,
        report_images=report_images,
    )
    return sum(finished)


def _make_pictures(
    sampler: "Sampler",
    store: "Store",
    plan: "Plan",
    todo: "list[ShardRange]",
    given: "NDArray[np.float32] | None",
    encoders: int,
    stop: threading.Event,
    telemetry: "Telemetry",
    progress: "Progress",
) -> int:
    """Make the pictures `todo` and return how many, fewer when it was stopped."""
    from deploy.generation.folder import generate_pictures, require_same_plan

    def report_images(images: int) -> None:
        if not checked:
            require_same_plan(store, plan)
            checked.append(True)
        progress.advance(images)
        telemetry.add("dcgan_generate_images_total", images)
        telemetry.set("dcgan_generate_last_shard_timestamp_seconds", time.time())

    checked: list[bool] = []
    return generate_pictures(
        sampler,
        plan,
        todo,
        store,
        _provenance(sampler),
        given=given,
        threads=encoders,
        stop=stop,
        report_images=report_images,
    )


def _sheet_of(text: str | None) -> tuple[int, int]:
    """Return the rows and columns of `--sheet ROWSxCOLUMNS`, or 0, 0 without it."""
    if text is None:
        return 0, 0
    match = re.fullmatch(r"([0-9]{1,5})[x×]([0-9]{1,5})", text)
    rows, columns = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= rows * columns <= MOST_SHEET_IMAGES:
        raise UsageError(f"--sheet {text}: expected ROWSxCOLUMNS such as 8x8, at most {MOST_SHEET_IMAGES:,} images")
    return rows, columns


def _read_latents(location: str, start: int) -> "NDArray[np.float32]":
    """Return the z in a .npy file. Raises UsageError for --start, DataError when the file holds something else."""
    import io

    import numpy as np

    from pipeline.common.storage import locate

    if start:
        raise UsageError(f"--start {start}: with --latents the images are those of the file, from 0 on")
    store, name = locate(location)
    expected = "expected a .npy of float32 (images, latent_dim), all finite"
    try:
        z = np.load(io.BytesIO(store.read(name)), allow_pickle=False)
    except (ValueError, EOFError, MemoryError):
        raise DataError(f"--latents {location}: not a .npy file of numbers; {expected}") from None
    if not isinstance(z, np.ndarray) or z.ndim != 2 or not z.size or z.dtype != np.float32 or not np.isfinite(z).all():
        found = f"{z.dtype} {z.shape}" if isinstance(z, np.ndarray) else "several arrays"
        raise DataError(f"--latents {location}: {found}; {expected}")
    return np.ascontiguousarray(z)


def _write_sheet(
    store: "Store", sampler: "Sampler", plan: "Plan", given: "NDArray[np.float32] | None", rows: int, columns: int
) -> None:
    """Write the first `rows` times `columns` images of the generation as one picture; nothing for none."""
    import numpy as np

    from deploy.generation.pipeline import cut, image_blocks, needed_blocks
    from deploy.generation.plan import ShardRange
    from pipeline.common.imaging import encode, grid

    if not rows * columns:
        return
    wanted = [ShardRange(plan.start, plan.start + rows * columns)]
    firsts = [block * plan.block_images for block in needed_blocks(wanted, plan.block_images)]
    blocks = image_blocks(sampler, plan, firsts, given)
    parts = [part for first, images in zip(firsts, blocks, strict=True) for _, part in cut(wanted, first, images)]
    store.write(SHEET, encode(grid(np.concatenate(parts), columns), "png"))
    print(f"written: {store.path(SHEET)}")


def _plan(sampler: "Sampler", choices: dict[str, Any], given: "NDArray[np.float32] | None") -> "Plan":
    """Return the plan that `sampler` and the options make.

    Raises UsageError for z of another width, and for labels that the model does not have.
    """
    from deploy.generation.labels import plan_labels
    from deploy.generation.plan import Plan, default_shard_images
    from pipeline.common.shapes.size import parse_size
    from pipeline.common.storage import sha256_bytes

    if given is not None and given.shape[1] != sampler.latent_dim:
        raise UsageError(f"--latents: z of {given.shape[1]} values, but the model takes {sampler.latent_dim}")
    if sampler.image_shape[2] == 4 and choices["format"] == "jpg":
        raise UsageError("--format jpg: the images have transparency, and a JPEG has none; use webp, png or packed")
    label, draw = choices.pop("label"), choices.pop("labels")
    if not sampler.network.label and (label, draw) != (None, None):
        option = f"--label {label}" if label is not None else f"--labels {draw}"
        raise UsageError(f"{option}: the model is not conditioned on a label; leave the option out")
    labels = plan_labels(sampler.network, label, draw) if sampler.network.label else None
    image_bytes = math.prod(parse_size(choices["image_size"])) * sampler.image_shape[2]
    label_bytes = 0 if labels is None else labels.largest_bytes
    shard_images = choices["shard_images"] or default_shard_images(image_bytes, choices["format"], label_bytes)
    return Plan.model_validate(
        choices
        | {
            "labels": labels,
            "shard_images": shard_images,
            "latents_sha256": None if given is None else sha256_bytes(given.tobytes()),
            "model_sha256": sampler.model_sha256,
            "backend": sampler.backend,
            "block_images": sampler.batch,
            "latent_dim": sampler.latent_dim,
            "latent_distribution": sampler.latent_distribution,
            "channels": sampler.image_shape[2],
        }
    )


def _restored(sampler: "Sampler") -> int | str:
    """Return the size of images in the proportion of the pictures, of which no side is shorter than the network's.

    Raises UsageError when the pictures were not stretched.
    """
    from pipeline.common.shapes.size import with_aspect

    if sampler.network.aspect is None:
        raise UsageError(
            "--restore-aspect: the model does not say that its images were stretched; it does when its data set was "
            "built with --fit stretch"
        )
    height, width, _ = sampler.image_shape
    return with_aspect(width, height, sampler.network.aspect)


def _provenance(sampler: "Sampler") -> Any:
    """Return what the records of this process's shards say about it."""
    from deploy.generation.manifest import Provenance
    from pipeline.common.machine import imported_versions, processor

    return Provenance(
        device=sampler.device, provider=sampler.provider, processor=processor(), versions=imported_versions()
    )


def _report(store: "Store", plan: "Plan", images: int, seconds: float) -> None:
    """Print what this process made and whether the generation is finished."""
    from deploy.generation.folder import read_folder_manifest
    from deploy.generation.manifest import MANIFEST, read_manifest

    finished = (read_folder_manifest if plan.layout == "folder" else read_manifest)(store) is not None
    made = (
        f"{images:,} images in {seconds:.1f} s ({images / seconds:,.0f} a second)" if images else "nothing left to do"
    )
    if finished:
        print(f"{made}; all {plan.count:,} images are finished: {store.path(MANIFEST)}")
    else:
        print(f"{made}; other parts are not finished yet: {store.location}")


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and Ctrl-C set. A second signal ends the program at once."""
    stop = threading.Event()
    interrupted = threading.Event()

    def note(number: int, frame: object) -> None:
        at_once = signal.SIG_DFL if number == signal.SIGTERM else previous[signal.SIGINT]
        signal.signal(number, at_once)
        print("stopping after the shards that are being written", file=sys.stderr, flush=True)
        if number == signal.SIGINT:
            interrupted.set()
        stop.set()

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    except Stopped:
        if interrupted.is_set():
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
