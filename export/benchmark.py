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

from export import ceilings, cold_start
from export.card import ComputePrecision, read_card
from export.driver import driver_version
from export.samplers import (
    CHECKPOINT_BACKENDS,
    ONNX_BACKENDS,
    PLAN_BACKENDS,
    Sampler,
    available_threads,
    open_sampler,
)
from pipeline.errors import UnavailableError, UsageError
from pipeline.imaging import encode
from pipeline.latents import latents
from pipeline.progress import Progress
from pipeline.randomness import Purpose

BASELINE = "eager"
CONTROL = "eager, again"
SETTLE_SECONDS = 0.02
"""Pause before each turn: threads that still spin for the last backend would be charged to the next."""


@dataclass(frozen=True)
class Subject:
    """One thing to measure: a model under a backend."""

    label: str
    model: str
    backend: str
    precision: ComputePrecision = "fp32"

    def open(self, batch: int | None, threads: int | None) -> Sampler:
        """Return its sampler for blocks of `batch`."""
        return open_sampler(self.model, backend=self.backend, batch=batch, threads=threads, precision=self.precision)


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
    from export.benchmark_report import write_report

    if ckpt is None and not models:
        raise UsageError("nothing to measure: give --ckpt, --model, or both")
    threads = threads or available_threads()
    out.mkdir(parents=True, exist_ok=True)  # a path that cannot be written is told before the work
    effort = Effort(5, 0.1, 2) if quick else Effort(rounds, 0.3, 200 if driver_version() else 5)
    with _models(ckpt, models, max(batches)) as files:
        subjects, left_out = choose_subjects(ckpt, files, backends, quick=quick)
        timings = measure(subjects, sorted(set(batches)), effort, threads)
        once = [] if quick else [subject for subject in subjects if subject.label != CONTROL]
        extras = {subject.label: _once(subject, threads) for subject in once}
        work = _work(ckpt, files)
    device = "cuda" if _has_cuda() else "cpu"
    limits = {
        "flops_per_second": ceilings.matrix_flops_per_second(device),
        "copy_bytes_per_second": ceilings.copy_bytes_per_second(device),
    }
    if device == "cuda":
        limits["flops_per_second_fp16"] = ceilings.matrix_flops_per_second(device, "fp16")
    return write_report(out, timings, extras, left_out, work, limits, effort, threads)


def choose_subjects(
    ckpt: str | None, models: list[str], backends: list[str], *, quick: bool
) -> tuple[list[Subject], dict[str, str]]:
    """Return what can be measured here, and why the rest cannot."""
    candidates: list[Subject] = []
    if ckpt is not None:
        candidates += [Subject(backend, ckpt, backend) for backend in CHECKPOINT_BACKENDS]
        if _has_cuda():  # PyTorch's CPU kernels for fp16 are for completeness, not for speed
            candidates += [Subject(f"{backend} fp16", ckpt, backend, "fp16") for backend in CHECKPOINT_BACKENDS]
    for model in models:
        known = PLAN_BACKENDS if model.endswith(".plan") else ONNX_BACKENDS
        suffix = f" {Path(model).stem}" if len(models) > 1 else ""
        candidates += [Subject(f"{backend}{suffix}", model, backend) for backend in known]
    if unknown := set(backends) - {subject.backend for subject in candidates}:
        have = ", ".join(dict.fromkeys(subject.backend for subject in candidates))
        raise UsageError(f"--backend {', '.join(sorted(unknown))}: expected one of {have}")
    subjects, left_out = [], {}
    for subject in candidates:
        if backends and subject.backend not in backends:
            continue
        if quick and subject.backend == "compiled" and not backends:
            left_out[subject.label] = "--quick does not wait for the compiler; name it with --backend compiled"
            continue
        try:
            subject.open(None, None).close()
        except UnavailableError as error:
            left_out[subject.label] = str(error)
        else:
            subjects.append(subject)
    if not subjects:
        raise UnavailableError(f"no backend can run: {'; '.join(f'{k}: {v}' for k, v in left_out.items())}")
    if any(subject.label == BASELINE for subject in subjects):
        subjects.append(Subject(CONTROL, ckpt or "", BASELINE))
    return subjects, left_out


def measure(subjects: list[Subject], batches: list[int], effort: Effort, threads: int) -> dict[tuple[str, int], Timing]:
    """Return the timings of every subject at every batch size that it takes."""
    timings: dict[tuple[str, int], Timing] = {}
    order = random.Random(0)
    with Progress("benchmark", len(batches) * effort.rounds, "rounds") as progress:
        for batch in batches:
            with ExitStack() as stack:
                samplers = {s.label: stack.enter_context(s.open(batch, threads)) for s in subjects}
                for label, sampler in samplers.items():
                    timings[label, batch] = Timing()
                    for _ in range(effort.warm_up):
                        sampler.sample(_z(sampler))
                for _ in range(effort.rounds):
                    for label in order.sample(list(samplers), len(samplers)):
                        _turn(samplers[label], timings[label, batch], effort.turn_seconds)
                    progress.advance(1)
    return timings


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
    fresh = cold_start.measure(subject.model, subject.backend, batch, threads, subject.precision)
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
    from export.onnx_model import export_onnx

    assert ckpt is not None
    with tempfile.TemporaryDirectory() as folder:
        card = export_onnx(ckpt, Path(folder), max_batch=max(max_batch, 2), parity_images=1)
        yield [str(Path(folder) / card.file)]


def _work(ckpt: str | None, models: list[str]) -> ceilings.Work:
    """Count the work of an image; the architecture alone decides it."""
    from pipeline.checkpoint import load_generator
    from pipeline.networks import Generator

    generator = Generator(read_card(models[0]).network) if models else load_generator(ckpt or "").generator
    return ceilings.work_of(generator.eval())


def _has_cuda() -> bool:
    import torch

    return driver_version() is not None and torch.cuda.is_available()
