"""Opening a model for sampling: which backends run which kind of model, and which one `auto` chooses."""

import importlib.util

from export.format.card import SUFFIXES, ComputePrecision, read_model
from export.samplers.base import BATCH_ON_CPU, BATCH_ON_GPU, Sampler
from export.samplers.choice import CPU_BACKENDS, choose_cpu_backend
from pipeline.common.errors import UsageError
from pipeline.common.machine import available_threads

# The backends of each kind of model.
CHECKPOINT_BACKENDS = ("eager", "channels_last", "compiled", "cuda-graphs")
ONNX_BACKENDS = (*CPU_BACKENDS, "onnxruntime-cuda", "onnxruntime-tensorrt")
ENGINE_BACKENDS = ("tensorrt",)

# The kinds, as errors name them.
CHECKPOINT, ONNX_FILE, ENGINE = "a checkpoint", "an ONNX file", "a TensorRT engine"


def open_sampler(
    model: str,
    *,
    backend: str = "auto",
    batch: int | None = None,
    threads: int | None = None,
    precision: ComputePrecision = "fp32",
) -> Sampler:
    """Open `model` for sampling: an ONNX file or an engine with its card, or any form of `--ckpt`; path or URL.

    `batch` is the fixed block size, by default 256 on a GPU and 64 on the CPU, at most the model's largest. `threads`
    are those of the CPU, by default one for each core. `precision` is that of a checkpoint's arithmetic; other models
    bring their own. PyTorch backends use a CUDA device if there is one.

    Raises UsageError for a backend that cannot run this kind of model and for a batch that the model does not take,
    DataError for a model that does not match its card, UnavailableError when a library or device is missing.
    """
    if batch is not None and batch < 1:
        raise UsageError(f"--batch {batch}: expected at least 1")
    threads = threads or available_threads()
    kind, known = _kind_of(model)
    if backend not in ("auto", *known):
        raise UsageError(f"--backend {backend} cannot run {model}, {kind}: expected auto, {', '.join(known)}")
    if kind == CHECKPOINT:
        from export.samplers.torch import open_checkpoint

        return open_checkpoint(model, backend, batch, threads, precision)
    if kind == ENGINE:
        card, data = read_model(model)
    else:
        from export.format.onnx_file import load_checked

        card, data = load_checked(model)
    if batch is not None and batch > card.max_batch:
        raise UsageError(f"--batch {batch}: {model} takes at most {card.max_batch} images; export it with --max-batch")
    if kind == ENGINE:
        from export.samplers.tensorrt import open_engine

        return open_engine(model, card, data, min(batch or BATCH_ON_GPU, card.max_batch))
    from export.samplers.onnx import open_onnx

    reason = ""
    if backend == "auto" and _runs_cuda():
        backend = "onnxruntime-cuda"
    elif backend == "auto":
        choice = choose_cpu_backend(model, card, min(batch or BATCH_ON_CPU, card.max_batch), threads)
        backend, reason = choice.backend, choice.reason
    default = BATCH_ON_GPU if "-" in backend else BATCH_ON_CPU
    sampler = open_onnx(model, card, data, backend, min(batch or default, card.max_batch), threads)
    sampler.chosen_because = reason
    return sampler


def backends_of(model: str) -> tuple[str, ...]:
    """Return the backends that run the kind of model that `model` is, by its name."""
    return _kind_of(model)[1]


def _kind_of(model: str) -> tuple[str, tuple[str, ...]]:
    """Return the kind of `model`, by its name, and the backends that run it."""
    if not model.endswith(SUFFIXES):
        return CHECKPOINT, CHECKPOINT_BACKENDS
    return (ENGINE, ENGINE_BACKENDS) if model.endswith(".plan") else (ONNX_FILE, ONNX_BACKENDS)


def _runs_cuda() -> bool:
    """Whether ONNX Runtime has a GPU here, by driver and installed libraries, never by a timing."""
    from export.format.driver import driver_version

    if driver_version() is None or not importlib.util.find_spec("onnxruntime"):
        return False
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
