"""Throughput and latency of every backend that runs here, in interleaved rounds, against the device's ceilings."""

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from export.benchmark import cold_start
from export.benchmark import roofline as ceilings
from export.benchmark.cases import CONTROL, Subject, choose_subjects
from export.format.card import Precision, read_card
from export.format.driver import driver_version
from export.samplers.base import Sampler
from pipeline.common.errors import DataError, UnavailableError, UsageError
from pipeline.common.imaging import encode
from pipeline.common.machine import available_threads
from pipeline.common.progress import Progress
from pipeline.common.randomness import Purpose
from pipeline.model.latents import latents

Limits = dict[tuple[str, Precision], ceilings.Ceiling]
"""By device (cpu or cuda) and precision of the arithmetic."""
SETTLE_SECONDS = 0.02
"""Pause before each turn: threads that still spin for the last backend would be charged to the next."""


@dataclass
class Timing:
    """Times of one subject at one batch size."""

    rates: list[float] = field(default_factory=list)
    """Images/s of each round, images in host memory."""
    latencies: list[float] = field(default_factory=list)
    """Seconds of single blocks."""
    device_seconds: list[float] = field(default_factory=list)
    """Seconds of single launches by CUDA events, without copies."""


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int
    turn_seconds: float
    """Of one subject in one round."""
    warm_up: int
    """Blocks before the first turn."""


def run_benchmark(
    out: Path,
    *,
    ckpt: str | None,
    models: list[str],
    backends: list[str],
    batches: list[int],
    rounds: int = 15,
    quick: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure and write `out`/bench.json and bench.png; return the content of bench.json.

    Without `models` an ONNX file is made from `ckpt` for the time of the benchmark.
    """
    from export.benchmark.report import write_report

    if ckpt is None and not models:
        raise UsageError("nothing to measure: give --ckpt, --model, or both")
    threads = threads or available_threads()
    out.mkdir(parents=True, exist_ok=True)  # a path that cannot be written is told before the work
    effort = Effort(5, 0.1, 2) if quick else Effort(rounds, 0.3, 200 if driver_version() else 5)
    with _models(ckpt, models, max(batches)) as files:
        subjects, left_out = choose_subjects(ckpt, files, backends, quick=quick)
        timings, too_large = measure(subjects, sorted(set(batches)), effort, threads)
        once = [] if quick else [subject for subject in subjects if subject.label != CONTROL]
        extras = {subject.label: _once(subject, threads) for subject in once}
    return write_report(out, subjects, timings, extras, left_out | too_large, measure_limits(subjects), effort, threads)


def measure_limits(subjects: list[Subject]) -> Limits:
    """Return the ceiling of every device and precision among `subjects`, measured now."""
    kinds = sorted({(subject.device, subject.precision) for subject in subjects})
    return {(device, precision): ceilings.measure(device, precision) for device, precision in kinds}


def measure(
    subjects: list[Subject], batches: list[int], effort: Effort, threads: int
) -> tuple[dict[tuple[str, int], Timing], dict[str, str]]:
    """Return the timings of every subject at every batch size that it takes, and why it does not take the others."""
    timings: dict[tuple[str, int], Timing] = {}
    left_out: dict[str, str] = {}
    order = random.Random(0)
    with Progress("benchmark", len(batches) * effort.rounds, "rounds") as progress:
        for batch in batches:
            with ExitStack() as stack:
                samplers: dict[str, Sampler] = {}
                for subject in subjects:
                    try:
                        sampler = stack.enter_context(subject.open(batch, threads))
                        for _ in range(effort.warm_up):
                            sampler.sample(_z(sampler))
                    except (UsageError, DataError, UnavailableError) as error:  # too large for the model or the GPU
                        left_out[f"{subject.label}, batch {batch}"] = str(error)
                    else:
                        samplers[subject.label], timings[subject.label, batch] = sampler, Timing()
                for _ in range(effort.rounds):
                    for label in order.sample(list(samplers), len(samplers)):
                        _turn(samplers[label], timings[label, batch], effort.turn_seconds)
                    progress.advance(1)
    if not timings:
        raise UsageError(f"nothing could be measured: {'; '.join(f'{k}: {v}' for k, v in left_out.items())}")
    return timings, left_out


def _turn(sampler: Sampler, timing: Timing, seconds: float) -> None:
    """Let one sampler work for about `seconds`."""
    z = _z(sampler)
    time.sleep(SETTLE_SECONDS)
    began = time.perf_counter()
    sampler.sample(z)  # wakes its threads and refills the caches, and tells how many blocks fit into the turn
    blocks = max(1, round(seconds / (time.perf_counter() - began)))
    times = [time.perf_counter()]
    for _ in sampler.stream(z for _ in range(blocks)):
        times.append(time.perf_counter())
    timing.rates.append(blocks * sampler.batch / (times[-1] - times[0]))
    if sampler.works_ahead:  # blocks overlap: their latency has to be measured one at a time
        for _ in range(min(blocks, 20)):
            began = time.perf_counter()
            sampler.sample(z)
            timing.latencies.append(time.perf_counter() - began)
        timing.device_seconds += sampler.time_launches(min(blocks, 20))
    else:
        timing.latencies += [later - earlier for earlier, later in zip(times, times[1:], strict=False)]


def _z(sampler: Sampler) -> np.ndarray[Any, np.dtype[np.float32]]:
    return latents(0, Purpose.BENCHMARK, 0, sampler.batch, sampler.latent_dim, sampler.latent_distribution)


def _once(subject: Subject, threads: int) -> dict[str, float | None]:
    """Return what is measured once a subject: cold start, peak memory, and images/s into encoded files."""
    with subject.open(None, threads) as sampler:
        batch = sampler.batch
        into_files = _encoded_rate(sampler, threads)
    on_gpu = subject.device == "cuda"
    fresh = cold_start.measure(subject.model, subject.backend, batch, threads, subject.checkpoint_precision, on_gpu)
    return {"jpg_images_per_second": into_files, **(fresh or {"cold_start_seconds": None, "peak_bytes": None})}


def _encoded_rate(sampler: Sampler, threads: int, seconds: float = 1.0) -> float:
    """Return images/s from z to JPEG files on disk, encoded in threads while the sampler works."""
    z = _z(sampler)
    sampler.sample(z)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:

        def save(block: int, images: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
            data = b"".join(encode(image, "jpg") for image in images)
            (Path(folder) / f"{block}.jpgs").write_bytes(data)

        began, done = time.perf_counter(), []
        for block, images in enumerate(sampler.stream(_until(began + seconds, lambda: z))):
            done.append(pool.submit(save, block, images))
        for future in done:
            future.result()
        return len(done) * sampler.batch / (time.perf_counter() - began)


def _until(end: float, make: Callable[[], Any]) -> Iterator[Any]:
    while time.perf_counter() < end:
        yield make()


@contextmanager
def _models(ckpt: str | None, models: list[str], max_batch: int) -> Iterator[list[str]]:
    """Yield the files to measure: those given, or an ONNX file made from the checkpoint for the time being."""
    if models:
        for model in models:
            read_card(model)
        yield models
        return
    from export.builders.onnx_model import export_onnx

    assert ckpt is not None
    with tempfile.TemporaryDirectory() as folder:
        card = export_onnx(ckpt, Path(folder), max_batch=max(max_batch, 2), parity_images=1)
        yield [str(Path(folder) / card.file)]
