"""TensorRT and TensorRT-RTX as libraries: their import and log, and the GPU and system that engines depend on."""

import importlib
import platform
from dataclasses import dataclass
from typing import Any

from export.format.card import RuntimeName
from export.format.driver import driver_version
from pipeline.common.errors import UnavailableError, first_line

MODULES: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""The compute capabilities that TensorRT-RTX 1.7 builds for by default. Turing (7.5) would need its own engine."""


def load_module(runtime: RuntimeName) -> Any:
    """Import TensorRT or TensorRT-RTX. Raises UnavailableError with the package to install."""
    try:
        return importlib.import_module(MODULES[runtime])
    except (ImportError, OSError, RuntimeError) as error:
        detail = "" if isinstance(error, ModuleNotFoundError) else f" ({first_line(error)})"
        raise UnavailableError(
            f"--runtime {runtime}: the Python package {MODULES[runtime]} cannot be imported{detail}; "
            f"pip install {package_for(runtime)}"
        ) from None


def package_for(runtime: RuntimeName) -> str:
    """Return the pip package of `runtime` for the CUDA version of the driver here."""
    if runtime == "tensorrt-rtx":
        return "tensorrt-rtx-cu13"
    driver = driver_version()
    if driver is None:
        return "tensorrt-cu13 with a CUDA 13 driver, tensorrt-cu12 with a CUDA 12 driver"
    return f"tensorrt-cu{driver.split('.')[0]}"


def make_logger(trt: Any) -> Any:
    """Return a TensorRT logger that keeps the error lines and prints nothing."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class is known at run time only
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


@dataclass(frozen=True)
class Gpu:
    """The GPU that PyTorch uses."""

    name: str
    compute_capability: str


def this_gpu() -> Gpu:
    """Return the GPU here. Raises UnavailableError when PyTorch cannot use it."""
    import torch

    if driver_version() is None or not torch.cuda.is_available():
        raise UnavailableError(
            f"no NVIDIA GPU that PyTorch {torch.__version__} can use: install a CUDA build of PyTorch and a driver"
        )
    major, minor = torch.cuda.get_device_capability()
    return Gpu(torch.cuda.get_device_name(), f"{major}.{minor}")


def system() -> str:
    """Return operating system and processor, for example Linux-x86_64."""
    return f"{platform.system()}-{platform.machine()}"
