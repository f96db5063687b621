"""TensorRT's builder: an ONNX graph becomes a serialized engine, by one path for 10.13 to 11.x and TensorRT-RTX.

Engines are strongly typed: the precision is the graph's. The code uses only names that exist in all of these
versions; tests/export/engines/test_tensorrt_names.py checks them against lists of each version's names.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.format.card import Card, Engine, RuntimeName
from export.format.driver import driver_version
from export.format.tensorrt_library import (
    RTX_CAPABILITIES,
    load_module,
    make_logger,
    system,
    this_gpu,
)
from pipeline.common.errors import DataError, UnavailableError, UsageError
from pipeline.common.storage import spare_bytes, write_atomic

BEST_BATCH = 64
"""TensorRT chooses the kernels of the throughput profile for this batch size."""


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built. The card records what a rebuild needs."""

    runtime: RuntimeName = "tensorrt"
    tf32: bool = False
    """Allow TF32 for float32 products on tensor cores: faster, with a relative error of about 1e-3."""
    optimization_level: int = 3
    """From 0, the fastest build, to 5, the longest search for fast kernels; TensorRT's default is 3."""
    timing_cache: Path | None = None
    """Folder of measured kernel times, which make the next build faster."""


def require_builder(runtime: RuntimeName) -> Any:
    """Return the TensorRT module. Raises UnavailableError, with what to do, when no engine can be built here."""
    if runtime == "tensorrt" and driver_version() is None:
        raise UnavailableError(
            "--runtime tensorrt: no NVIDIA GPU and driver here, and TensorRT builds an engine on the GPU that runs it; "
            "--runtime tensorrt-rtx builds without one, or export an ONNX file with dcgan-export onnx and build there"
        )
    if runtime == "tensorrt":
        this_gpu()  # the card names the GPU: refuse before the minutes of a build
    return load_module(runtime)


def can_run(runtime: RuntimeName) -> bool:
    """Return whether an engine of `runtime` can run where it is built, as TensorRT-RTX builds without a GPU."""
    try:
        gpu = this_gpu()
    except UnavailableError:
        return False
    return runtime == "tensorrt" or gpu.compute_capability in RTX_CAPABILITIES


def profiles(max_batch: int) -> list[list[int]]:
    """Return [smallest, best, largest batch] of two profiles: 0 for a single image, 1 for throughput."""
    return [[1, 1, 1], [1, min(BEST_BATCH, max_batch), max_batch]]


def build_engine(model: str, card: Card, data: bytes, options: BuildOptions) -> tuple[bytes, Engine]:
    """Return the serialized engine of the ONNX bytes `data`, and its target. Errors name `model`.

    Raises UnavailableError when TensorRT or the GPU is missing, DataError when it cannot build this graph.
    """
    if not 0 <= options.optimization_level <= 5:
        raise UsageError(f"--optimization-level {options.optimization_level}: expected 0 to 5")
    trt = require_builder(options.runtime)
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(data):
        problems = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise DataError(f"{model}: {options.runtime} cannot parse it: {_one_line(problems or logger.errors)}")
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    config.max_aux_streams = 0  # a CUDA graph is captured from one stream
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    for batches in profiles(card.max_batch):
        if config.add_optimization_profile(batch_profile(builder, card, batches)) < 0:
            raise DataError(f"{model}: {options.runtime} refuses the batch profile {'/'.join(map(str, batches))}")
    with _timing_cache(trt, config, options):
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:  # the reason is in the log, not in an exception
            raise DataError(f"{model}: {options.runtime} {trt.__version__} cannot build it: {_one_line(logger.errors)}")
    return bytes(serialized), describe_target(trt, card, options)


def batch_profile(builder: Any, card: Card, batches: list[int]) -> Any:
    """Return a profile in which every input of the graph has the smallest, best and largest of `batches`."""
    profile = builder.create_optimization_profile()
    for port in card.inputs:
        profile.set_shape(port.name, *((batch, *port.shape[1:]) for batch in batches))
    return profile


def describe_target(trt: Any, card: Card, options: BuildOptions) -> Engine:
    """Return the target of an engine that is built here."""
    gpu = this_gpu() if options.runtime == "tensorrt" else None
    return Engine(
        runtime=options.runtime,
        version=trt.__version__,
        gpu=gpu.name if gpu else None,
        compute_capability=gpu.compute_capability if gpu else None,
        driver=driver_version(),
        system=system(),
        profiles=profiles(card.max_batch),
        optimization_level=options.optimization_level,
        onnx=card.file,
        onnx_sha256=card.sha256,
    )


@contextmanager
def _timing_cache(trt: Any, config: Any, options: BuildOptions) -> Iterator[None]:
    """Use the timing cache of this TensorRT version, GPU and driver, and save what the build added to it."""
    if options.timing_cache is None:
        yield
        return
    gpu = this_gpu().name if options.runtime == "tensorrt" else "any"
    key = f"{options.runtime}-{trt.__version__}-{gpu}-{driver_version()}"
    path = options.timing_cache / f"{re.sub(r'[^A-Za-z0-9.]+', '_', key)}.timing"
    known = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")  # TensorRT refused the old one: replace it
        config.set_timing_cache(cache, False)
    yield  # `cache` must live until the engine is built
    made = bytes(config.get_timing_cache().serialize())
    if hashlib.sha256(made).digest() != hashlib.sha256(known).digest() and spare_bytes(path.parent) >= len(made):
        write_atomic(path, made)


def _one_line(messages: list[str]) -> str:
    return " ".join("; ".join(messages or ["TensorRT gives no reason"]).split())[:600]
