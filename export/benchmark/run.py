"""The benchmark: throughput and latency of every backend that runs here, in interleaved rounds."""

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from export.benchmark import cold_start, roofline
from export.benchmark.cases import CONTROL, Case, choose_cases
from export.benchmark.report import write_report
from export.benchmark.roofline import Rooflines
from export.benchmark.timing import MeasurementSettings, Timing, Timings
from export.format.card import read_card
from export.format.driver import driver_version
from export.format.rows import rows_at
from export.samplers.base import Sampler
from pipeline.common.errors import DataError, UnavailableError, UsageError
from pipeline.common.imaging import encode
from pipeline.common.machine import available_threads
from pipeline.common.progress import Progress
from pipeline.common.randomness import Purpose
from pipeline.common.storage import require_writable

SETTLE_SECONDS = 0.02
"""Pause before each turn: threads of the last backend that still spin would slow the next one."""


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
    if ckpt is None and not models:
        raise UsageError("nothing to measure: give --ckpt, --model, or both")
    threads = threads or available_threads()
    require_writable(out)  # before the work
    settings = MeasurementSettings(rounds, turn_seconds=0.3, warm_up_blocks=200 if driver_version() else 5)
    if quick:
        settings = MeasurementSettings(rounds=5, turn_seconds=0.1, warm_up_blocks=2)
    with _models(ckpt, models, max(batches)) as files:
        cases, left_out = choose_cases(ckpt, files, backends, quick=quick)
        timings, too_large = measure(cases, sorted(set(batches)), settings, threads)
        measured_once = [] if quick else [case for case in cases if case.label != CONTROL]
        extras = {case.label: _once(case, threads) for case in measured_once}
    return write_report(out, cases, timings, extras, left_out | too_large, measure_rooflines(cases), settings, threads)


def measure_rooflines(cases: list[Case]) -> Rooflines:
    """Measure the roofline of every device and precision among `cases`."""
    kinds = sorted({(case.device, case.precision) for case in cases})
    return {(device, precision): roofline.measure(device, precision) for device, precision in kinds}


def measure(
    cases: list[Case], batches: list[int], settings: MeasurementSettings, threads: int
) -> tuple[Timings, dict[str, str]]:
    """Return the timings of every case at every batch size that it takes, and why it refuses the others."""
    timings: Timings = {}
    left_out: dict[str, str] = {}
    order = random.Random(0)
    with Progress("benchmark", len(batches) * settings.rounds, "rounds") as progress:
        for batch in batches:
            with ExitStack() as stack:
                samplers: dict[str, Sampler] = {}
                for case in cases:
                    try:
                        sampler = stack.enter_context(case.open(batch, threads))
                        for _ in range(settings.warm_up_blocks):
                            sampler.sample(_z(sampler))
                    except (UsageError, DataError, UnavailableError) as error:  # too large for the model or the GPU
                        left_out[f"{case.label}, batch {batch}"] = str(error)
                    else:
                        samplers[case.label], timings[case.label, batch] = sampler, Timing()
                for _ in range(settings.rounds):
                    for label in order.sample(list(samplers), len(samplers)):
                        _turn(samplers[label], timings[label, batch], settings.turn_seconds)
                    progress.advance(1)
    if not timings:
        raise UsageError(f"nothing could be measured: {'; '.join(f'{k}: {v}' for k, v in left_out.items())}")
    return timings, left_out


def _turn(sampler: Sampler, timing: Timing, seconds: float) -> None:
    """Run one sampler for about `seconds`."""
    z = _z(sampler)
    time.sleep(SETTLE_SECONDS)
    began = time.perf_counter()
    sampler.sample(z)  # wakes threads, fills caches, and tells how many blocks fit into the turn
    blocks = max(1, round(seconds / (time.perf_counter() - began)))
    times = [time.perf_counter()]
    for _ in sampler.stream(z for _ in range(blocks)):
        times.append(time.perf_counter())
    timing.rates.append(blocks * sampler.batch / (times[-1] - times[0]))
    if sampler.works_ahead:  # blocks overlap, so their latency is measured one at a time
        for _ in range(min(blocks, 20)):
            began = time.perf_counter()
            sampler.sample(z)
            timing.latencies.append(time.perf_counter() - began)
        timing.device_seconds += sampler.time_launches(min(blocks, 20))
    else:
        timing.latencies += [later - earlier for earlier, later in zip(times, times[1:], strict=False)]


def _z(sampler: Sampler) -> np.ndarray[Any, np.dtype[np.float32]]:
    return rows_at(sampler.network, 0, Purpose.BENCHMARK, 0, sampler.batch)


def _once(case: Case, threads: int) -> dict[str, float | None]:
    """Return what is measured once for each case: cold start, peak memory, and images/s into JPEG files."""
    with case.open(None, threads) as sampler:
        batch = sampler.batch
        into_files = _encoded_rate(sampler, threads)
    on_gpu = case.device == "cuda"
    fresh = cold_start.measure(case.model, case.backend, batch, threads, case.checkpoint_precision, on_gpu)
    return {"jpg_images_per_second": into_files, **(fresh or {"cold_start_seconds": None, "peak_bytes": None})}


def _encoded_rate(sampler: Sampler, threads: int, seconds: float = 1.0) -> float:
    """Return images/s from z to JPEG files on disk; threads encode while the sampler works."""
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
    """Yield the files to measure: those given, or an ONNX file made from the checkpoint and removed at the end."""
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
