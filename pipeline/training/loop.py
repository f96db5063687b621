"""train(): the adversarial loop, read from top to bottom. Everything is counted in images."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.common.ranks import ranks_of
from pipeline.config import RunConfig
from pipeline.data.classes import Classes
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.loading.device_set import AnyLoader, open_loader
from pipeline.model.latents import latent_blocks
from pipeline.training.accelerator import make_accelerator, meet_peers, together
from pipeline.training.boundary import Boundary
from pipeline.training.evaluator import Evaluator
from pipeline.training.identity import describe_run
from pipeline.training.manager import CheckpointManager
from pipeline.training.preflight import check_ranks_agree, check_settings, warn
from pipeline.training.run_directory import RunDirectory, indexed
from pipeline.training.run_log import RunLog, open_telemetry
from pipeline.training.schedule import Due, Schedule
from pipeline.training.step import AdversarialStep, turns
from pipeline.training.stop_requests import StopRequests, stopped
from pipeline.training.update.ahead import Ahead
from pipeline.training.update.labels import label_blocks, with_aspect, with_classes
from pipeline.training.watchdog import Watchdog
from pipeline.training.window import Window

log = logging.getLogger(__name__)


def train(
    config: RunConfig,  # what to learn, and when to do what
    *,
    data: str,  # a data set, or the tars of one
    out: Path,  # the run directory
    resume: Literal["auto", "never"] = "auto",  # continue a run that is there, or insist on a new one
    init_from: Sequence[str] = (),  # weights of other networks that a new run begins from
    allow_change: Sequence[str] = (),  # parts of the run's identity that may differ from its checkpoint
    mirror: str | None = None,  # object store that gets a copy of every finished checkpoint
    metrics_port: int | None = None,  # serve /metrics there, from local rank 0 of each node
    metrics_address: str = "127.0.0.1",  # and on this address
    log_with: Sequence[str] = (),  # trackers that get losses, quality, grids and settings as well
    push_gateway: str | None = None,  # push the final counters to this Pushgateway
    on_batch: Callable[[int, Any, NDArray[np.float32]], None] | None = None,  # (position, reals, z)
) -> None:
    """Train until `config.schedule.total_images`, resuming from the newest checkpoint.

    Raises Stopped at SIGTERM and Interrupted at SIGINT, with everything saved; ConfigConflict, DataError or UsageError
    before the first step for what cannot work; DataError when training diverges, Collapsed when it falls apart.
    """
    recipe, network = config.recipe, config.network
    with ExitStack() as resources:
        telemetry = resources.enter_context(open_telemetry(out, metrics_port, metrics_address))
        # Armed first: a rank that hangs while it starts is as bad as one that hangs in a step.
        watchdog = resources.enter_context(Watchdog(config.runtime.step_timeout_seconds, meet_peers(telemetry)))
        accelerator = make_accelerator()
        rank, world_size, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
        data = resources.enter_context(indexed(data, out, network, accelerator))
        requests = resources.enter_context(StopRequests())  # not earlier: until here there is nothing to save

        # The data; the run directory, in which only the main process writes; the networks, and where the run stands.
        def open_run() -> tuple[Dataset, RunConfig, Classes | None, RunDirectory | None, CheckpointManager]:
            dataset = open_dataset(data)
            check_settings(config, dataset, accelerator)
            settled, classes = with_classes(with_aspect(config, dataset), dataset)
            run = resources.enter_context(RunDirectory(out, dataset.location)) if main else None
            manager = CheckpointManager(settled, describe_run(settled, dataset), accelerator, out, mirror)
            return dataset, settled, classes, run, manager

        dataset, config, classes, run, manager = together(accelerator, open_run)
        check_ranks_agree(config, dataset, accelerator)
        checkpoint = manager.find(resume, allow_change, init_from)
        step = AdversarialStep(config, accelerator)
        seen = together(accelerator, lambda: manager.restore(step, checkpoint, run))

        # Images from there on, and what people and machines see of the run.
        def open_rest() -> tuple[AnyLoader, RunLog, Evaluator]:
            if telemetry is not None:
                resources.callback(telemetry.close)  # pushes once more, while the run is still locked
                telemetry.start(metrics_port, metrics_address, push_gateway if main else None)
            place = config, dataset, accelerator.device, seen, ranks_of(accelerator)
            loader = open_loader(*place, lambda: watchdog.waiting_for_data(data), requests.end_loading)
            resources.callback(loader.close)
            evaluator = Evaluator(config, dataset, out / "samples", accelerator)
            return loader, RunLog(config, run, telemetry), evaluator

        loader, run_log, evaluator = together(accelerator, open_rest)
        run_log.begin(manager.description, seen, accelerator, log_with)
        if main:
            warn(config, accelerator, from_noise=manager.from_noise)
            log.info("%s at image %d of %d", "resuming" if seen else "beginning", seen, config.schedule.total_images)
            log.info("%d images; %s", dataset.images, loader.footprint)

        # Train.
        window = Window(accelerator, requests, step.statistics, seen, checkpoint)
        schedule, stop = Schedule(config.schedule, window.begin, recipe.batch), 0
        here = {"start": seen, "rank": rank, "world_size": world_size}
        latents = resources.enter_context(closing(Ahead(latent_blocks(config, **here))))
        labels = resources.enter_context(closing(Ahead(label_blocks(config, dataset, classes, **here))))
        boundary = Boundary(accelerator, step, window, evaluator, manager, schedule, run_log)
        resources.callback(lambda: boundary.close(hurry=bool(stop)))
        resources.callback(watchdog.close)  # before the mirror is waited for
        if checkpoint is None:
            boundary.do(Due(True, *[bool(init_from)] * 2), seen)  # of weights that others made, worth to be saved
        while not (schedule.finished(seen) or stop or boundary.guard.ended):
            # One update on images [seen, seen + batch) of the run; this rank has every world_size-th of them.
            start = time.perf_counter()
            with watchdog.waiting_for_data(data):
                reals = loader.next_batch()
            z = next(latents)
            if on_batch is not None:
                on_batch(seen, reals, z)
            step.update(reals, z, seen, next(labels))
            window.add(recipe.batch, seconds := time.perf_counter() - start, turns(recipe, seen))
            seen += recipe.batch
            run_log.step(seconds)
            watchdog.beat()
            if not schedule.at_agreement(seen):
                continue
            # The only sync, where all ranks agree on what to do next; at a log boundary also on what was seen.
            end, affordable = schedule.at_boundary(seen), schedule.affordable(saving=manager.saving) if main else 0
            waited, overdue, finite = loader.wait_seconds, schedule.checkpoint_overdue, step.examine(images=end)
            report = window.reduce(waited, overdue, finite, end=end, affordable=affordable)
            run_log.window(report, seen, mirror=manager.mirror_state, prefetched=loader.prefetched_images)
            run_log.written(manager.check())
            report.require_finite(manager.newest)
            stop, wanted = report.stop, report.save or bool(report.stop)
            due = schedule.due(seen, report.slowest_step_seconds, report.affordable, checkpoint_wanted=wanted)
            if due.task:
                with watchdog.task(due.task):
                    boundary.do(due, seen)

        with watchdog.task("the last checkpoint"):
            newest = together(accelerator, manager.newest)
        run_log.written(manager.check())
        # On success only: NCCL waits for all ranks here, and a rank that failed alone would wait forever.
        accelerator.end_training()
        boundary.guard.require_sound(newest)
        if stop and not schedule.finished(seen):
            raise stopped(stop, f"at image {seen:,}, saved in {newest}; run it again to resume")
        log.info("done: %d images, %s", seen, out)
