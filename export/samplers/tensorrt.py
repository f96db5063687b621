"""The sampler of a TensorRT engine. It refuses an engine that was not built for this machine before it loads it."""

import shlex
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.format.card import Card, Engine, beside
from export.format.driver import driver_version
from export.format.graph import columns
from export.format.onnx_file import check_network
from export.format.tensorrt_library import RTX_CAPABILITIES, load_module, make_logger, system, this_gpu
from export.samplers.base import Sampler
from export.samplers.cuda import WARM_UP_LAUNCHES, CudaSampler, memory_errors
from pipeline.common.errors import DataError, UnavailableError
from pipeline.model.sampling import to_uint8


@dataclass(frozen=True)
class Here:
    """The properties of this machine that an engine is tied to."""

    version: str
    """Version of the installed TensorRT."""
    gpu: str
    compute_capability: str
    driver: str
    system: str


def open_engine(model: str, card: Card, data: bytes, batch: int) -> Sampler:
    """Return a sampler of the engine `data`, which belongs to `card`; `model` is named in errors.

    Raises UnavailableError without a GPU or TensorRT, DataError when the engine belongs to another machine.
    """
    engine = require_fit(model, card)
    with memory_errors(batch):
        return TensorRTSampler(load_module(engine.runtime), model, card, data, batch)


def require_fit(model: str, card: Card) -> Engine:
    """Return the target of an engine that fits this machine. Loads neither the engine nor a TensorRT runtime.

    Raises UnavailableError without a GPU or TensorRT, DataError when the engine does not fit.
    """
    engine = card.engine
    assert engine is not None, "read_card refuses an engine whose card has no target"
    check_network(model, card, card.network)
    if driver_version() is None:
        raise UnavailableError(
            f"{model}: a TensorRT engine needs an NVIDIA GPU and its driver, and none is here; "
            f"on the CPU use the ONNX file it was built from, {engine.onnx}"
        )
    gpu = this_gpu()
    version = load_module(engine.runtime).__version__
    here = Here(version, gpu.name, gpu.compute_capability, driver_version() or "", system())
    differs, matches = compare(engine, here)
    if differs:
        raise DataError(
            f"{model}: does not fit this machine: {'; '.join(differs)} (what fits: {', '.join(matches) or 'nothing'}). "
            f"Rebuild it here: {rebuild_command(model, card)}, or dcgan-generate --rebuild"
        )
    return engine


def compare(engine: Engine, here: Here) -> tuple[list[str], list[str]]:
    """Return the reasons why an engine cannot run `here`, and what does match. Without a reason, it can run."""
    if engine.gpu is None:
        supported = ", ".join(RTX_CAPABILITIES)
        gpu_fits = here.compute_capability in RTX_CAPABILITIES
        gpu = (
            f"a TensorRT-RTX engine runs on compute capabilities {supported}, and {here.gpu} has "
            f"{here.compute_capability}: use --runtime tensorrt"
        )
    else:
        gpu_fits = (engine.gpu, engine.compute_capability) == (here.gpu, here.compute_capability)
        gpu = f"built for {engine.gpu} ({engine.compute_capability}), here is {here.gpu} ({here.compute_capability})"
    driver_fits = engine.driver is None or _numbers(here.driver) >= _numbers(engine.driver)
    checks = [
        (
            f"{engine.runtime} {here.version}",
            engine.version == here.version,
            f"built by {engine.runtime} {engine.version}, installed is {here.version}",
        ),
        (here.system, engine.system == here.system, f"built on {engine.system}, this is {here.system}"),
        (here.gpu, gpu_fits, gpu),
        (
            f"the driver for CUDA {here.driver}",
            driver_fits,
            f"built with a driver for CUDA {engine.driver}, here is an older one for {here.driver}",
        ),
    ]
    return [why for _, fits, why in checks if not fits], [what for what, fits, _ in checks if fits]


def rebuild_command(model: str, card: Card) -> str:
    """Return the command line that builds the engine `model` again from the ONNX file beside it."""
    assert card.engine is not None
    where = ["--ckpt", beside(model, card.engine.onnx), "--out", beside(model, "") or ".", "--name", card.file]
    how = ["--runtime", card.engine.runtime, "--precision", card.precision]
    level = ["--optimization-level", str(card.engine.optimization_level)]
    return shlex.join(["dcgan-export", "trt", *where, *how, *level])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


class TensorRTSampler(CudaSampler):
    """An engine with one execution context, in the profile for the block size, replayed as a CUDA graph."""

    backend = "tensorrt"

    def __init__(self, trt: Any, model: str, card: Card, data: bytes, batch: int) -> None:
        super().__init__(card.network, batch, card.sha256)
        assert card.engine is not None
        self.provider = f"{card.engine.runtime} {trt.__version__} {card.precision}"
        self._logger = make_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise DataError(f"{model}: cannot be loaded: {self._reason()}; build it again with dcgan-export trt")
        self._context = _create_context(trt, self._engine)
        if self._context is None:
            raise UnavailableError(f"{model}: no execution context: {self._reason()}; free some GPU memory")
        self._float_output = card.output_kind == "float"
        shape = (batch, *(int(size) for size in card.output.shape[1:]))
        dtype = torch.float32 if self._float_output else torch.uint8
        with torch.cuda.stream(self._compute):
            self._output = torch.zeros(shape, dtype=dtype, device="cuda")
            self._inputs = input_buffers(card, self._z)
        self._bind(model, card, batch)
        self._record()

    def _bind(self, model: str, card: Card, batch: int) -> None:
        """Select the profile, set the shape, and give the context our buffers."""
        context, stream = self._context, self._compute.cuda_stream
        profile = 0 if batch == 1 else 1  # export.builders.tensorrt.profiles
        accepted = context.set_optimization_profile_async(profile, stream)
        self._compute.synchronize()
        shapes = {name: tuple(values.shape) for name, values in self._inputs.items()}
        accepted = accepted and all(context.set_input_shape(name, shape) for name, shape in shapes.items())
        try:
            missing = context.infer_shapes() if accepted else [*shapes]
        except RuntimeError as error:
            missing = [str(error)]
        if missing:
            raise DataError(
                f"{model}: refuses a batch of {batch}: {self._reason()}; its profiles are {_profiles(card)}"
            )
        for name, values in {**self._inputs, "image": self._output}.items():
            if not context.set_tensor_address(name, values.data_ptr()):
                raise DataError(f"{model}: has no tensor {name!r}; build it again with dcgan-export trt")

    def _record(self) -> None:
        """Run a few times, so that lazy initialization is not recorded, then capture a graph if that is possible."""
        with torch.cuda.stream(self._compute):
            for _ in range(WARM_UP_LAUNCHES):
                self._execute()
        self._compute.synchronize()
        # TensorRT-RTX cannot be captured while it still compiles kernels for this shape.
        capturable = getattr(self._context, "is_stream_capturable", None)
        if capturable is None or capturable(self._compute.cuda_stream):
            self._capture(lambda z: self._execute())

    def _execute(self) -> torch.Tensor:
        if self.network.label:  # else the rows are z, and lie in its buffer
            for name, values in columns(self.network, self._z).items():
                self._inputs[name].copy_(values)
        if not self._context.execute_async_v3(self._compute.cuda_stream):
            raise UnavailableError(f"{self.provider}: the launch failed: {self._reason()}")
        self._images = to_uint8(self._output) if self._float_output else self._output
        return self._images

    def _launch(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._execute()

    def floats(self, z: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Return the float images (N, C, H, W) of at most `batch` rows of z, or None if the engine outputs uint8."""
        if not self._float_output:
            return None
        self.sample(z)
        images: NDArray[np.float32] = self._output[: len(z)].cpu().numpy()
        return images

    def close(self) -> None:
        """Free graph, context, engine and runtime in this order, because each points into the next."""
        super().close()
        self._context = self._engine = self._runtime = None

    def _reason(self) -> str:
        return " ".join("; ".join(self._logger.errors).split())[:400] or "TensorRT gives no reason"


def input_buffers(card: Card, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the memory of every input for `rows` (batch, row_dim): z is there; with a label each has its own."""
    if card.label is None:
        return {card.input.name: rows}
    types = {"float32": torch.float32, "int64": torch.int64}
    found = columns(card.network, rows)
    return {
        port.name: torch.zeros(found[port.name].shape, dtype=types[port.dtype], device=rows.device)
        for port in card.inputs
    }


def _create_context(trt: Any, cuda_engine: Any) -> Any:
    """Return an execution context whose kernels are chosen now, not while it runs.

    By default TensorRT-RTX starts with general kernels and replaces them in the background. Then neither the images'
    last bits nor a captured graph would be the same from run to run.
    """
    strategies = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
    if strategies is None:
        return cuda_engine.create_execution_context()
    runtime_config = cuda_engine.create_runtime_config()
    runtime_config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    return cuda_engine.create_execution_context(runtime_config)


def _profiles(card: Card) -> str:
    return ", ".join("/".join(map(str, sizes)) for sizes in card.engine.profiles) if card.engine else "unknown"
