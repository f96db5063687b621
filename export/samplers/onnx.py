"""Samplers of an ONNX file: OpenVINO on the CPU; ONNX Runtime on the CPU, CUDA or TensorRT."""

import io
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.format.card import Card
from export.format.driver import driver_version
from export.format.rows import feeds
from export.samplers.base import Sampler
from pipeline.common.errors import DataError, UnavailableError
from pipeline.common.imaging import to_pixels
from pipeline.common.machine import use_no_signal_stack

CPU = "CPUExecutionProvider"
PROVIDERS = {
    "onnxruntime": [CPU],
    "onnxruntime-cuda": ["CUDAExecutionProvider"],
    # Nodes that TensorRT does not take run on CUDA, not on the CPU.
    "onnxruntime-tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider"],
}
# By default the CUDA provider uses TF32, and times algorithms and takes the fastest, so that bytes differ from run to
# run. The TensorRT provider has no such switch: its float32 products run as TF32, TensorRT's default.
PROVIDER_OPTIONS = {"CUDAExecutionProvider": {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}}


def open_onnx(model: str, card: Card, data: bytes, backend: str, batch: int, threads: int) -> Sampler:
    """Return a sampler of the ONNX bytes `data`, which belong to `card`; `model` is named in errors."""
    if backend == "openvino":
        return OpenVinoSampler(model, card, data, batch, threads)
    return OnnxRuntimeSampler(model, card, data, backend, batch, threads)


class _OnnxSampler(Sampler):
    """The common part: if the graph's output is the network's float, this converts it to uint8."""

    def __init__(self, card: Card, batch: int) -> None:
        super().__init__(card.network, batch, card.sha256)
        self._float_output = card.output_kind == "float"

    def _pixels(self, output: NDArray[Any]) -> NDArray[np.uint8]:
        images: NDArray[np.uint8] = output
        if self._float_output:
            images = to_pixels(output)
        return images


class OnnxRuntimeSampler(_OnnxSampler):
    """ONNX Runtime. One call copies z in, computes, and copies the images out, so blocks do not overlap."""

    def __init__(self, model: str, card: Card, data: bytes, backend: str, batch: int, threads: int) -> None:
        super().__init__(card, batch)
        self.backend = backend
        self._session = create_session(model, data, backend, threads)
        self.provider = self._session.get_providers()[0]
        self.device = "cpu" if backend == "onnxruntime" else _gpu_name()

    def _run(self, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
        try:
            return self._pixels(self._session.run(["image"], feeds(self.network, rows))[0])
        except Exception as error:  # pybind has some ten error types; most often memory is short
            raise UnavailableError(
                f"{self.provider} cannot run a block of {self.batch} images: {_first_line(error)}; "
                "a smaller --batch needs less memory"
            ) from None


def create_session(model: str, data: bytes, backend: str, threads: int) -> Any:
    """Return an onnxruntime.InferenceSession of `data` that runs only on the providers of `backend`.

    By default ONNX Runtime moves to the CPU what a provider cannot run, and only logs it: single nodes at load, the
    whole graph after an error. Both are switched off.

    Raises UnavailableError when a library or the provider is missing, or the provider does not take the whole graph;
    DataError when the CPU cannot load the graph.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UnavailableError(
            f"{model}: needs ONNX Runtime: pip install onnxruntime (onnxruntime-gpu on a machine with an NVIDIA GPU)"
        ) from None
    providers = PROVIDERS[backend]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.use_deterministic_compute = True
    if providers != [CPU]:
        _prepare_cuda(onnxruntime, providers[0])
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    chosen = [(provider, PROVIDER_OPTIONS.get(provider, {})) for provider in providers]
    try:
        session = onnxruntime.InferenceSession(data, options, providers=chosen, enable_fallback=0)
    except Exception as error:  # pybind has some ten error types
        if providers == [CPU]:
            raise DataError(f"{model}: ONNX Runtime cannot load it: {_first_line(error)}; export it again") from None
        raise UnavailableError(
            f"{model}: {providers[0]} cannot run all of it: {_first_line(error)}; "
            "see https://onnxruntime.ai/docs/execution-providers for the CUDA, cuDNN and TensorRT versions it needs, "
            "or choose another --backend"
        ) from None
    used = session.get_providers()[: len(providers)]
    if used != providers:
        raise UnavailableError(f"{model}: ONNX Runtime runs it on {', '.join(used)}, expected {', '.join(providers)}")
    return session


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _prepare_cuda(onnxruntime: Any, provider: str) -> None:
    if driver_version() is None:
        raise UnavailableError(f"{provider} needs an NVIDIA GPU and its driver; on the CPU use --backend openvino")
    if provider not in onnxruntime.get_available_providers():
        raise UnavailableError(
            f"this ONNX Runtime has no {provider}: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
        )
    onnxruntime.preload_dlls()  # CUDA and cuDNN from PyTorch's own packages


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cuda"


def _import_openvino(model: str) -> Any:
    """Return the module openvino, without the package by which its import reports its use to an analytics service.

    That package also writes an identifier into the home folder, and fails where there is no home folder. OpenVINO has
    a stand-in for where it is not installed, and no setting that switches it off.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as if it were not installed
    try:
        import openvino
    except ImportError:
        raise UnavailableError(f"{model}: --backend openvino needs OpenVINO: pip install openvino") from None
    return openvino


class OpenVinoSampler(_OnnxSampler):
    """OpenVINO on the CPU, compiled for one fixed batch size, which makes it fast.

    Large blocks are cut into pieces that run in parallel, one thread each: no thread waits for another within a
    layer, and feature maps stay in the caches. The size of a piece does not depend on the number of threads, so
    neither do the images.
    """

    backend = "openvino"
    device = "cpu"
    piece = 4
    """Images in a piece, in blocks of at least four pieces; measured as the fastest of 4, 8, 16 and 32."""

    def __init__(self, model: str, card: Card, data: bytes, batch: int, threads: int) -> None:
        super().__init__(card, batch)
        openvino = _import_openvino(model)
        self._rows = self.piece if batch >= 4 * self.piece else batch
        pieces = -(-batch // self._rows)
        core = openvino.Core()
        try:
            graph = core.read_model(io.BytesIO(data))
            graph.reshape({port.name: [self._rows, *port.shape[1:]] for port in card.inputs})
            compiled = core.compile_model(
                graph,
                "CPU",
                {
                    "NUM_STREAMS": min(threads, pieces),
                    "INFERENCE_NUM_THREADS": threads,
                    "INFERENCE_PRECISION_HINT": "f32",  # else it takes bf16 where the processor has it
                },
            )
        except RuntimeError as error:
            line = str(error).strip().splitlines()[-1]
            raise DataError(f"{model}: OpenVINO cannot load it: {line}; export it again") from None
        use_no_signal_stack()  # compiling has set one
        self.provider = f"OpenVINO {compiled.get_property('EXECUTION_DEVICES')[0]}"
        self._requests = [compiled.create_infer_request() for _ in range(pieces)]
        self._block = np.zeros((pieces * self._rows, self.row_dim), np.float32)

    def _run(self, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
        self._block[: self.batch] = rows
        inputs = feeds(self.network, self._block)  # kept until the requests have read them
        for index, request in enumerate(self._requests):
            piece = slice(index * self._rows, (index + 1) * self._rows)
            request.start_async({name: values[piece] for name, values in inputs.items()}, share_inputs=True)
        for request in self._requests:
            request.wait()
        outputs = [request.get_output_tensor(0).data for request in self._requests]
        # concatenate copies: the requests own the tensors and write the next block into them.
        return self._pixels(np.concatenate(outputs)[: self.batch])
