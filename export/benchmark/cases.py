"""What a benchmark can measure here: every backend that runs, and why the others do not."""

from dataclasses import dataclass, replace
from pathlib import Path

from export.format.card import ComputePrecision, Precision, read_card
from export.format.driver import driver_version
from export.samplers.base import CHECKPOINT_BACKENDS, ONNX_BACKENDS, PLAN_BACKENDS, Sampler, open_sampler
from pipeline.checkpoints.reference import load_generator
from pipeline.common.errors import DataError, UnavailableError, UsageError, UserError
from pipeline.config import NetworkConfig

BASELINE = "eager"
CONTROL = "eager, again"


@dataclass(frozen=True)
class Subject:
    """One thing to measure: a model under a backend."""

    label: str
    model: str
    backend: str
    network: NetworkConfig
    precision: Precision = "fp32"
    """Of the arithmetic."""
    device: str = "cpu"
    """cpu or cuda."""

    def open(self, batch: int | None, threads: int | None) -> Sampler:
        """Return its sampler for blocks of `batch`."""
        return open_sampler(
            self.model, backend=self.backend, batch=batch, threads=threads, precision=self.checkpoint_precision
        )

    @property
    def checkpoint_precision(self) -> ComputePrecision:
        """What a checkpoint has to be told; other models have their own."""
        return "fp16" if self.precision == "fp16" else "fp32"


def choose_subjects(
    ckpt: str | None, models: list[str], backends: list[str], *, quick: bool
) -> tuple[list[Subject], dict[str, str]]:
    """Return what can be measured here, and why the rest cannot."""
    candidates: list[Subject] = []
    device = "cuda" if _has_cuda() else "cpu"
    if ckpt is not None:
        network = load_generator(ckpt).config
        candidates += [Subject(backend, ckpt, backend, network, "fp32", device) for backend in CHECKPOINT_BACKENDS]
        if device == "cuda":  # PyTorch's CPU kernels for fp16 are for completeness, not for speed
            halves = CHECKPOINT_BACKENDS[1:]  # in fp16 eager is channels_last: the network as trained is float32
            candidates += [Subject(f"{backend} fp16", ckpt, backend, network, "fp16", device) for backend in halves]
    for model in models:
        known = PLAN_BACKENDS if model.endswith(".plan") else ONNX_BACKENDS
        suffix = f" {Path(model).stem}" if len(models) > 1 else ""
        card = read_card(model)
        for backend in known:
            arithmetic = _arithmetic(backend, card.precision)
            device = "cuda" if model.endswith(".plan") or "-" in backend else "cpu"
            candidates.append(Subject(f"{backend}{suffix}", model, backend, card.network, arithmetic, device))
    if unknown := set(backends) - {subject.backend for subject in candidates}:
        have = ", ".join(dict.fromkeys(subject.backend for subject in candidates))
        raise UsageError(f"--backend {', '.join(sorted(unknown))}: expected one of {have}")
    subjects: list[Subject] = []
    left_out: dict[str, str] = {}
    refusal: type[UserError] = DataError  # the code of nothing at all: every model is bad, or the machine is
    for subject in candidates:
        if backends and subject.backend not in backends:
            continue
        if quick and subject.backend == "compiled" and not backends:
            left_out[subject.label] = "--quick does not wait for the compiler; name it with --backend compiled"
            continue
        try:
            subject.open(None, None).close()
        except (UnavailableError, DataError) as error:
            left_out[subject.label] = str(error)
            refusal = UnavailableError if isinstance(error, UnavailableError) else refusal
        else:
            subjects.append(subject)
    if not subjects:
        raise refusal(f"no backend can run: {'; '.join(f'{k}: {v}' for k, v in left_out.items())}")
    subjects += [replace(subject, label=CONTROL) for subject in subjects if subject.label == BASELINE]
    return subjects, left_out


def _arithmetic(backend: str, precision: Precision) -> Precision:
    """Return what a model of `precision` is computed in."""
    if backend in ("openvino", "onnxruntime"):
        return "fp32"  # neither has fp16 convolutions for the CPU: they convert
    if backend == "onnxruntime-tensorrt" and precision == "fp32":
        return "tf32"  # export.samplers.onnx: it cannot be told otherwise
    return precision


def _has_cuda() -> bool:
    import torch

    return driver_version() is not None and torch.cuda.is_available()
