"""The cases of a benchmark: every model and backend that runs here, and why the others do not."""

from dataclasses import dataclass, replace
from pathlib import Path

from export.format.card import ComputePrecision, Precision, read_card
from export.format.driver import driver_version
from export.samplers.base import Sampler
from export.samplers.open import CHECKPOINT_BACKENDS, ENGINE_BACKENDS, ONNX_BACKENDS, open_sampler
from pipeline.checkpoints.reference import load_generator
from pipeline.common.errors import DataError, UnavailableError, UsageError, UserError
from pipeline.config import NetworkConfig

BASELINE = "eager"
CONTROL = "eager, again"


@dataclass(frozen=True)
class Case:
    """One case to measure: a model in a backend."""

    label: str
    model: str
    backend: str
    network: NetworkConfig
    precision: Precision = "fp32"
    """Of the arithmetic, which may differ from the model's."""
    device: str = "cpu"
    """cpu or cuda."""

    def open(self, batch: int | None, threads: int | None) -> Sampler:
        """Return its sampler for blocks of `batch`."""
        return open_sampler(
            self.model, backend=self.backend, batch=batch, threads=threads, precision=self.checkpoint_precision
        )

    @property
    def checkpoint_precision(self) -> ComputePrecision:
        """The precision to open a checkpoint in; other models bring their own."""
        return "fp16" if self.precision == "fp16" else "fp32"


def choose_cases(
    ckpt: str | None, models: list[str], backends: list[str], *, quick: bool
) -> tuple[list[Case], dict[str, str]]:
    """Return the cases that run here, and the reason for each that does not, by its label.

    Raises UsageError for an unknown backend, and DataError or UnavailableError when no case runs.
    """
    candidates: list[Case] = []
    device = "cuda" if _has_cuda() else "cpu"
    if ckpt is not None:
        network = load_generator(ckpt).config
        candidates += [Case(backend, ckpt, backend, network, "fp32", device) for backend in CHECKPOINT_BACKENDS]
        if device == "cuda":  # on the CPU, PyTorch's fp16 kernels are slower than fp32
            halves = CHECKPOINT_BACKENDS[1:]  # eager in fp16 would be channels_last: as trained is float32
            candidates += [Case(f"{backend} fp16", ckpt, backend, network, "fp16", device) for backend in halves]
    for model in models:
        known = ENGINE_BACKENDS if model.endswith(".plan") else ONNX_BACKENDS
        suffix = f" {Path(model).stem}" if len(models) > 1 else ""
        card = read_card(model)
        for backend in known:
            arithmetic = _arithmetic(backend, card.precision)
            device = "cuda" if model.endswith(".plan") or "-" in backend else "cpu"
            candidates.append(Case(f"{backend}{suffix}", model, backend, card.network, arithmetic, device))
    if unknown := set(backends) - {case.backend for case in candidates}:
        have = ", ".join(dict.fromkeys(case.backend for case in candidates))
        raise UsageError(f"--backend {', '.join(sorted(unknown))}: expected one of {have}")
    cases: list[Case] = []
    left_out: dict[str, str] = {}
    refusal: type[UserError] = DataError  # exit code when no case runs: DataError only if every model is bad
    for case in candidates:
        if backends and case.backend not in backends:
            continue
        if quick and case.backend == "compiled" and not backends:
            left_out[case.label] = "--quick does not wait for the compiler; name it with --backend compiled"
            continue
        try:
            case.open(None, None).close()
        except (UnavailableError, DataError) as error:
            left_out[case.label] = str(error)
            refusal = UnavailableError if isinstance(error, UnavailableError) else refusal
        else:
            cases.append(case)
    if not cases:
        raise refusal(f"no backend can run: {'; '.join(f'{k}: {v}' for k, v in left_out.items())}")
    cases += [replace(case, label=CONTROL) for case in cases if case.label == BASELINE]
    return cases, left_out


def _arithmetic(backend: str, precision: Precision) -> Precision:
    """Return the precision in which `backend` computes a model of `precision`."""
    if backend in ("openvino", "onnxruntime"):
        return "fp32"  # neither has fp16 convolutions for the CPU: both convert
    if backend == "onnxruntime-tensorrt" and precision == "fp32":
        return "tf32"  # export.samplers.onnx: this provider cannot switch TF32 off
    return precision


def _has_cuda() -> bool:
    import torch

    return driver_version() is not None and torch.cuda.is_available()
