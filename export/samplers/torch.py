"""Samplers of a checkpoint in PyTorch: as trained, folded and channels_last, compiled, or as a CUDA graph."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.format.card import ComputePrecision
from export.format.driver import driver_version
from export.format.graph import DeployedGenerator, tensors
from export.samplers.base import BATCH_ON_CPU, BATCH_ON_GPU, Sampler
from export.samplers.cuda import CudaSampler, memory_errors
from pipeline.checkpoints.reference import LoadedGenerator, load_generator
from pipeline.common.errors import UnavailableError
from pipeline.model.networks import Generator
from pipeline.model.sampling import to_uint8


def open_checkpoint(
    reference: str, backend: str, batch: int | None, threads: int, precision: ComputePrecision
) -> Sampler:
    """Return a sampler of the generator that `reference` names (any form of --ckpt)."""
    # Both are needed: the driver and a CUDA build of PyTorch.
    cuda = driver_version() is not None and torch.cuda.is_available()
    if backend == "cuda-graphs" and not cuda:
        raise UnavailableError(
            "--backend cuda-graphs needs an NVIDIA GPU, its driver and a CUDA build of PyTorch; here use channels_last"
        )
    if precision == "fp16" and not cuda:
        raise UnavailableError("fp16 arithmetic in PyTorch needs an NVIDIA GPU; on the CPU use fp32")
    loaded = load_generator(reference)
    if cuda:
        chosen = "cuda-graphs" if backend == "auto" else backend
        with memory_errors(batch or BATCH_ON_GPU):
            return TorchCudaSampler(loaded, chosen, batch or BATCH_ON_GPU, precision)
    return TorchSampler(loaded, "channels_last" if backend == "auto" else backend, batch or BATCH_ON_CPU, threads)


def prepare(loaded: LoadedGenerator, backend: str, precision: ComputePrecision = "fp32") -> torch.nn.Module:
    """Return a module rows float32 (N, row_dim) -> uint8 (N, H, W, C); without a label, rows are z.

    `eager` in fp32 is the network as trained. Otherwise BatchNorm is folded and memory is channels_last.
    """
    if backend == "eager" and precision == "fp32":
        return _AsTrained(loaded.generator)
    deployed = _FromRows(loaded.generator, precision=precision)
    deployed.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if backend == "compiled":
        deployed.compile(dynamic=False)  # the block size is fixed, so one specialized graph
    return deployed


@contextmanager
def _compiler_errors() -> Iterator[None]:
    """Turn a failure of torch.compile into a one-line error: most often there is no compiler."""
    try:
        yield
    except Exception as error:  # errors of dynamo, inductor and the compiler have no common class
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UnavailableError(
            f"--backend compiled: torch.compile fails here: {lines[0] if lines else type(error).__name__}; "
            "it needs a C++ compiler (g++), else use channels_last"
        ) from None


class _AsTrained(torch.nn.Module):
    """The network as trained, then uint8: the baseline."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return to_uint8(self.generator(*tensors(self.generator.config, rows)))


class _FromRows(DeployedGenerator):
    """The network as it is exported, made from rows."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self._made(*tensors(self.generator.config, rows))


class TorchSampler(Sampler):
    """PyTorch on the CPU."""

    device = "cpu"

    def __init__(self, loaded: LoadedGenerator, backend: str, batch: int, threads: int) -> None:
        super().__init__(loaded.config, batch, loaded.sha256)
        self.backend = backend
        self.provider = f"torch {torch.__version__}"
        torch.set_num_threads(threads)
        self._forward = prepare(loaded, backend)
        if backend == "compiled":
            with _compiler_errors():
                self._run(np.zeros((batch, self.row_dim), np.float32))

    def _run(self, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
        with torch.inference_mode():
            images: NDArray[np.uint8] = self._forward(torch.from_numpy(rows)).numpy()
        return images


class TorchCudaSampler(CudaSampler):
    """PyTorch on an NVIDIA GPU. `cuda-graphs` replays one recorded graph instead of some twenty launches."""

    def __init__(self, loaded: LoadedGenerator, backend: str, batch: int, precision: ComputePrecision) -> None:
        super().__init__(loaded.config, batch, loaded.sha256)
        self.backend = backend
        self.provider = f"torch {torch.__version__} {precision}"
        # The same bytes from run to run, and real float32: PyTorch's default for convolutions is TF32.
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False  # once the newer `conv.fp32_precision` is set, reading this raises
        self._forward: Any = prepare(loaded, backend, precision).cuda()
        with torch.inference_mode():
            with _compiler_errors() if backend == "compiled" else nullcontext():
                self._warm_up(self._forward)
            if backend == "cuda-graphs":
                self._capture(self._forward)

    def _launch(self) -> None:
        with torch.inference_mode():
            if self._graph is not None:
                self._graph.replay()
            else:
                self._images = self._forward(self._z)
