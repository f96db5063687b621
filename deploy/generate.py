"""dcgan-generate: sample any number of images from a model, into shards that training and evaluation can read.

    dcgan-generate --model model.onnx --count 1000000 --out samples/
    dcgan-generate --model model.onnx --count 1000000 --out s3://bucket/samples --part 3/20
    dcgan-generate merge s3://bucket/samples

Image i depends on the model, the seed and i alone. An interrupted command resumes when it is run again.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.common.command_line import Version, plain_app, run_command
from pipeline.common.errors import DataError, Stopped, UnavailableError, UsageError
from pipeline.common.telemetry import MetricsAddress, MetricsPort, PushGateway

if TYPE_CHECKING:
    from deploy.generation.plan import Plan
    from export.samplers.base import Sampler
    from pipeline.common.storage import Store
    from pipeline.common.telemetry import Telemetry

app = plain_app()


class Format(StrEnum):
    """Choices of --format."""

    webp = "webp"
    jpg = "jpg"
    png = "png"
    packed = "packed"


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
    part: Annotated[
        str | None, typer.Option(help="i/N makes part i of N, from 0; N alone takes i from JOB_COMPLETION_INDEX.")
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
                choices={
                    "seed": seed,
                    "start": start,
                    "count": count,
                    "format": format.value,
                    "quality": quality if format in (Format.jpg, Format.webp) else None,
                    "shard_images": shard_images,
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
    from deploy.generation.manifest import MANIFEST, merge
    from pipeline.common.storage import Store

    store = Store(out)
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
    choices: dict[str, Any],
) -> None:
    """Make the shards of this part, and merge if no shard of another part is missing."""
    from deploy.generation.manifest import begin, finish_shard, merge, missing, unfinished
    from deploy.generation.pipeline import generate_shards
    from export.samplers.open import open_sampler
    from pipeline.common.progress import Progress
    from pipeline.common.storage import Store, require_writable

    store = Store(out)
    require_writable(out)
    try:
        if rebuild:
            from export.builders.engine import rebuild_unless_it_fits

            rebuild_unless_it_fits(model)
        sampler = open_sampler(model, backend=backend, batch=batch, threads=threads)
    except (DataError, UnavailableError):
        telemetry.set("dcgan_generate_model_refused", 1)
        raise
    with sampler:
        plan = _plan(sampler, choices)
        if begin(store, plan):
            return _report(store, plan, 0, 0.0)
        shards = plan.shards()
        mine = [shards[position] for position in part.slice(len(shards))]
        todo = unfinished(store, plan, mine)
        total, left = sum(shard.images for shard in mine), sum(shard.images for shard in todo)
        telemetry.set("dcgan_generate_info", 1, backend=sampler.backend, provider=sampler.provider, format=plan.format)
        telemetry.set("dcgan_generate_target_images", total)
        telemetry.add("dcgan_generate_skipped_images_total", total - left)
        telemetry.set("dcgan_generate_last_shard_timestamp_seconds", time.time())
        provenance = _provenance(sampler)
        finished: list[int] = []

        def finish(shard: Any, writer: Any) -> None:
            record = finish_shard(store, plan, shard, writer, provenance)
            finished.append(shard.images)
            telemetry.add("dcgan_generate_written_bytes_total", record.shard.bytes)
            telemetry.set("dcgan_generate_last_shard_timestamp_seconds", time.time())

        def report_time(phase: str, seconds: float) -> None:
            telemetry.add("dcgan_generate_phase_seconds_total", seconds, phase=phase)

        def report_images(images: int) -> None:
            progress.advance(images)
            telemetry.add("dcgan_generate_images_total", images)

        what = f"part {part}" if part.count > 1 else "generating"
        began = time.monotonic()
        with Progress(what, total, done=total - left) as progress:
            generate_shards(
                sampler,
                plan,
                todo,
                finish,
                encoders=encoders,
                stop=stop,
                report_time=report_time,
                report_images=report_images,
            )
    if sum(finished) < left:
        raise Stopped(f"{store.location}: finished shards are kept; run the same command again to resume")
    if missing(store, plan)[1] is None:
        merge(store)  # does not tidy: a retry of the same part may still be writing
    _report(store, plan, left, time.monotonic() - began)


def _plan(sampler: "Sampler", choices: dict[str, Any]) -> "Plan":
    """Return the plan that `sampler` and the options make."""
    from deploy.generation.plan import Plan, default_shard_images

    image_bytes = sampler.image_size**2 * sampler.channels
    shard_images = choices["shard_images"] or default_shard_images(image_bytes, choices["format"])
    return Plan.model_validate(
        choices
        | {
            "shard_images": shard_images,
            "model_sha256": sampler.model_sha256,
            "backend": sampler.backend,
            "block_images": sampler.batch,
            "latent_dim": sampler.latent_dim,
            "latent_distribution": sampler.latent_distribution,
            "image_size": sampler.image_size,
            "channels": sampler.channels,
        }
    )


def _provenance(sampler: "Sampler") -> Any:
    """Return what the records of this process's shards say about it."""
    from deploy.generation.manifest import Provenance
    from pipeline.common.machine import versions

    return Provenance(
        device=sampler.device,
        provider=sampler.provider,
        versions=versions("torch", "onnxruntime", "onnxruntime-gpu", "tensorrt", "pillow", "simplejpeg"),
    )


def _report(store: "Store", plan: "Plan", images: int, seconds: float) -> None:
    """Print what this process made and whether the generation is finished."""
    from deploy.generation.manifest import MANIFEST, read_manifest

    made = (
        f"{images:,} images in {seconds:.1f} s ({images / seconds:,.0f} a second)" if images else "nothing left to do"
    )
    if read_manifest(store) is not None:
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
