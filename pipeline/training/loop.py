"""train(): the adversarial loop, read from top to bottom. Everything is counted in images."""

import logging
import os
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from numpy.typing import NDArray

from pipeline.common.errors import ConfigConflict, DataError, Interrupted, Stopped, UnavailableError
from pipeline.common.randomness import Purpose
from pipeline.common.telemetry import Telemetry
from pipeline.config import RunConfig
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.loading.loader import Loader
from pipeline.model.latents import latents
from pipeline.training.evaluator import QualityMeter, save_grid
from pipeline.training.manager import Saver, describe_run
from pipeline.training.run_directory import RunDirectory
from pipeline.training.run_log import Observer
from pipeline.training.step import AdversarialStep
from pipeline.training.stop_requests import Requests
from pipeline.training.watchdog import Watchdog
from pipeline.training.window import Interval

log = logging.getLogger(__name__)

SMALL_BATCHNORM = 16
LARGE_BATCH = 1_024


def train(
    config: RunConfig,  # what to learn, and when to do what
    *,
    data: str,  # folder or URL of shards
    out: Path,  # the run directory
    resume: Literal["auto", "never"] = "auto",  # continue a run that is there, or insist on a new one
    allow_change: Sequence[str] = (),  # parts of the run's identity that may differ from its checkpoint
    mirror: str | None = None,  # object store that gets a copy of every finished checkpoint
    metrics_port: int | None = None,  # serve /metrics there, from local rank 0 of each node
    metrics_address: str = "127.0.0.1",  # and on this address
    push_gateway: str | None = None,  # push the final counters to this Pushgateway
    on_batch: Callable[[int, NDArray[np.uint8], NDArray[np.float32]], None] | None = None,  # (position, reals, z)
) -> None:
    """Train until `config.schedule.total_images`, continuing from the newest checkpoint.

    Raises Stopped after SIGTERM and Interrupted after SIGINT, both with everything saved; ConfigConflict,
    DataError or UsageError before the first step for what cannot work; DataError when training diverges.
    """
    # Processes, devices, precision; what was asked for must divide over them.
    accelerator = make_accelerator()
    requests = Requests()  # not earlier: while the others are waited for there is nothing to save, and no Python runs
    rank, world_size, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    recipe, schedule, network = config.recipe, config.schedule, config.network
    config.check_processes(world_size)
    check_gpus(accelerator)
    if recipe.sync_batchnorm and world_size > 1 and accelerator.device.type != "cuda":
        raise ConfigConflict("recipe.sync_batchnorm=true works on CUDA only; this run is on the CPU: leave it false")
    dataset = open_dataset(data)
    check_images_fit(config, dataset)
    check_ranks_agree(config, dataset, accelerator)

    # The run directory, and where the run stands. Only the main process writes; its lock keeps others out.
    run = RunDirectory(out) if main else None
    saver = Saver(config, describe_run(config, dataset), accelerator, out, mirror)
    checkpoint = saver.find(allow_change)
    if checkpoint is not None and resume == "never":
        raise ConfigConflict(f"--resume never: {checkpoint.path} is already there; choose another --out")
    step = AdversarialStep(config, accelerator)
    seen = saver.restore(step, checkpoint, run) if checkpoint is not None else 0

    # Images from there on.
    loader = Loader(
        dataset,
        seed=recipe.seed,
        streams=recipe.streams,
        batch=recipe.batch,
        start=seen,
        rank=rank,
        world_size=world_size,
        threads=config.runtime.loader_threads,
    )

    # What people and machines see of it.
    telemetry = Telemetry("train", run=str(out.resolve())) if accelerator.is_local_main_process else None
    observer = Observer(config, run, telemetry)
    observer.begin(seen=seen, world_size=world_size, precision=accelerator.mixed_precision, device=step.device.type)
    if telemetry is not None:
        telemetry.start(metrics_port, metrics_address, push_gateway if main else None)
    meter = QualityMeter(dataset, schedule, recipe.seed, accelerator)
    if run is not None:
        observer.started(run.write_config(saver.description))
        run.open_board(seen)
        warn_about_batch(config, world_size)
        warn_about_threads(accelerator)
        log.info("%s at image %d of %d", "continuing" if seen else "beginning", seen, schedule.total_images)
        log.info("%d images; the loader holds at most %.0f MB a process", dataset.images, loader.resident_bytes / 1e6)

    def grid(generator_at: int) -> None:
        with observer.phase("grid"):
            averaged = step.ema.estimate_batchnorm(recipe.seed)
            if main:
                save_grid(averaged, recipe.seed, out / "samples" / f"{generator_at:09d}.png")

    # Train.
    interval = Interval(accelerator, requests)
    watchdog = Watchdog(config.runtime.step_timeout_seconds, enabled=world_size > 1)
    if checkpoint is None:
        if run is not None:
            run.restore_metrics(b"")
        grid(0)
    boundary, stop = seen, 0
    try:
        while seen < schedule.total_images and not stop:
            # One update on images [seen, seen + batch) of the run; this rank has every world_size-th of them.
            start = time.perf_counter()
            watchdog.waits_for_data = True
            reals = loader.next_batch()
            watchdog.waits_for_data = False
            drawn = (recipe.seed, Purpose.TRAIN, seen, recipe.batch, network.latent_dim, network.latent_distribution)
            z = latents(*drawn, rows=slice(rank, None, world_size))
            if on_batch is not None:
                on_batch(seen, reals, z)
            seen += recipe.batch
            statistics = step(reals, z, seen)
            seconds = time.perf_counter() - start
            interval.add(statistics, recipe.batch, seconds)
            observer.step(seconds)

            # A log boundary: the only sync, where all ranks agree on what was seen and what to do next.
            last, previous = seen >= schedule.total_images, boundary
            watchdog.beat()
            if not (last or crossed(schedule.log_every_images, previous, seen)):
                continue
            boundary = seen
            report = interval.agree(data_wait_seconds=loader.wait_seconds, save_due=saver.due())
            observer.interval(report, seen, mirror_failures=saver.mirror_failures)
            if lost := report.nonfinite_steps or report.hopeless_steps:
                raise DataError(
                    f"{lost} of the last {report.steps} updates had NaN or infinite gradients; "
                    f"the last good checkpoint is {saver.last_path or 'none'}: "
                    "continue from it with a smaller learning rate (recipe.learning_rate_g, recipe.learning_rate_d)"
                )

            # Pictures, quality, checkpoints.
            stop = report.stop
            picture = last or crossed(schedule.grid_every_images, previous, seen)
            evaluate = last or crossed(schedule.evaluate_every_images, previous, seen)
            save = evaluate or stop or report.save or crossed(schedule.checkpoint_every_images, previous, seen)
            kind = "evaluation" if evaluate else "checkpoint" if save else "picture" if picture else ""
            if kind:
                watchdog.begin(kind)
            if picture:
                grid(seen)
            quality: dict[str, float] = {}
            if evaluate:
                with observer.phase("evaluate"):
                    quality = meter.measure(step.ema.estimate_batchnorm(recipe.seed))
                observer.quality(quality, seen)
            if save:
                with observer.phase("checkpoint"):
                    saver.save(step, seen, run, quality)
            if kind:
                # Rank 0 alone writes, and comes last; on GPUs the others would run on into a step that seems to hang.
                wait_for_all(accelerator)
                watchdog.end(kind)

        # All ranks together: NCCL waits for the others here, so one that fails alone must not come by.
        accelerator.end_training()
        if stop and seen < schedule.total_images:
            message = (
                f"at image {seen:,} of {schedule.total_images:,}, saved in {saver.last_path}; run it again to go on"
            )
            raise Interrupted(message) if stop == signal.SIGINT else Stopped(message)
        if main:
            log.info("done: %d images, %s", seen, out)
    finally:
        watchdog.close()
        loader.close()
        saver.close(hurry=bool(stop))
        if telemetry is not None:
            telemetry.close()
        if run is not None:
            run.close()


def make_accelerator() -> Accelerator:
    """Return the accelerator that launch options and environment ask for.

    Raises UnavailableError when this machine cannot do the precision.
    """
    # Buffers are not broadcast: D runs twice before one backward. They are averaged before saving instead.
    # torch 2.13 renames the option to one that torch 2.11 and accelerate 1.15 do not know.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    try:
        accelerator = Accelerator(kwargs_handlers=handlers)
    except ValueError as error:
        raise UnavailableError(f"--mixed_precision: {error}; use bf16, or no") from None
    if accelerator.mixed_precision == "fp16" and not accelerator.native_amp:
        raise UnavailableError("--mixed_precision fp16: accelerate would train in float32 on the CPU; use bf16, or no")
    return accelerator


def check_gpus(accelerator: Accelerator) -> None:
    """Raise ConfigConflict where two processes would share a GPU over NCCL, which refuses that only later."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if accelerator.device.type != "cuda" or accelerator.num_processes == 1:
        return
    if torch.distributed.get_backend() == "nccl" and here > (gpus := torch.cuda.device_count()):
        raise ConfigConflict(f"{here} processes on a machine with {gpus} GPUs: each needs one of its own; start {gpus}")


def wait_for_all(accelerator: Accelerator) -> None:
    """Return when all processes have come here.

    Not accelerate's `wait_for_everyone`: it names a GPU by local rank to `barrier`, even for processes on the CPU, or
    that share one.
    """
    accelerator.reduce(torch.zeros(1, device=accelerator.device), "sum").item()


def crossed(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` images lies in (before, now]."""
    return now // every > before // every


def check_ranks_agree(config: RunConfig, dataset: Dataset, accelerator: Accelerator) -> None:
    """Raise ConfigConflict on every rank unless all have the same settings and data; else they would hang or part."""
    if accelerator.num_processes == 1:
        return
    mine = {f"{section}.{key}": value for section, keys in config.model_dump().items() for key, value in keys.items()}
    mine["data"] = dataset.fingerprint()[:12]
    first, *others = gather_object([mine])
    for rank, other in enumerate(others, 1):
        if different := [f"{key} {first[key]} and {other[key]}" for key in first if first[key] != other[key]]:
            raise ConfigConflict(
                f"ranks 0 and {rank} have different settings: {'; '.join(different)}. "
                "Start all of them with the same options and data (without --preset, each reads its own --out)"
            )


def check_images_fit(config: RunConfig, dataset: Dataset) -> None:
    """Raise ConfigConflict unless the shards hold what the network takes."""
    network = config.network
    for name in ("image_size", "channels"):
        if getattr(dataset, name) != getattr(network, name):
            raise ConfigConflict(
                f"--data {dataset.location} holds images of {name} {getattr(dataset, name)}, network.{name} is "
                f"{getattr(network, name)}; set network.{name}={getattr(dataset, name)} or build the shards again"
            )


def warn_about_threads(accelerator: Accelerator) -> None:
    """Say when cores lie idle: accelerate's launcher gives a process one thread unless told otherwise."""
    cores = len(os.sched_getaffinity(0))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if accelerator.device.type == "cpu" and (threads := torch.get_num_threads()) * processes < cores:
        log.info(
            "%d of %d cores in use; accelerate launch --num_cpu_threads_per_process %d uses all",
            threads * processes,
            cores,
            cores // processes,
        )


def warn_about_batch(config: RunConfig, world_size: int) -> None:
    """Say what BatchNorm and Adam make of the batch at this number of processes."""
    recipe = config.recipe
    share = recipe.batch // world_size // config.runtime.accumulate
    if share < SMALL_BATCHNORM and not (recipe.sync_batchnorm and world_size > 1):
        log.warning(
            "BatchNorm sees only %d images at a time; below %d its statistics are noise: "
            "use recipe.sync_batchnorm=true (CUDA), a larger recipe.batch, or fewer processes",
            share,
            SMALL_BATCHNORM,
        )
    if recipe.batch > LARGE_BATCH and recipe.learning_rate_d == recipe.learning_rate_g == 2e-4:
        log.warning(
            "recipe.batch=%d with the paper's learning rate of 2e-4 for batch 128: "
            "for Adam try up to sqrt(batch / 128) times as much, and watch D(real) - D(fake)",
            recipe.batch,
        )
