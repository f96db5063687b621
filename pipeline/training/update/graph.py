"""Runs the same device work again and again: kernel by kernel, or as one CUDA graph once it has warmed up."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from pipeline.common.errors import ConfigConflict, UnavailableError, first_line
from pipeline.config import RuntimeConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

WARM_UP = 11
"""Runs before the capture: in the first ten DDP times itself, which a graph cannot; cuDNN has chosen by then too."""


def use_graph(runtime: RuntimeConfig, accelerator: "Accelerator") -> bool:
    """Return whether an update runs as a CUDA graph. Raises ConfigConflict for runtime.graph=on where none can."""
    obstacle = None
    if accelerator.device.type != "cuda":
        obstacle = f"this run is on the {accelerator.device.type.upper()}"
    elif accelerator.scaler is not None:
        obstacle = "the loss scaler of fp16 decides on the host; use bf16, or no"
    elif accelerator.num_processes > 1 and (backend := torch.distributed.get_backend()) != "nccl":
        obstacle = f"only NCCL's collectives can be captured, and this run has {backend}"
    if runtime.graph == "on" and obstacle is not None:
        raise ConfigConflict(f"runtime.graph=on: there is no CUDA graph here: {obstacle} (or runtime.graph=auto)")
    return runtime.graph != "off" and obstacle is None


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Make `stream` the current one, in order with what comes before and after on the one that was; None changes none.

    A graph cannot be captured on CUDA's default stream, nor can gradients that DDP collects there.
    """
    if stream is None:
        yield
        return
    outside = torch.cuda.current_stream(stream.device)
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        yield
    outside.wait_stream(stream)


class Repeated(Generic[T]):
    """Device work with the same operations on the same memory each time; its warm-up is work like any other."""

    def __init__(self, work: Callable[[], T], stream: torch.cuda.Stream | None) -> None:
        """Becomes a graph on `stream`, on which it must be called; without one it never does."""
        self._work = work
        self._stream = stream
        self._runs = 0
        self._graph: tuple[torch.cuda.CUDAGraph, T] | None = None
        if stream is not None:
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True", UserWarning)

    def __call__(self) -> T:
        """Do the work once; return its result, whose tensors a graph fills again each time.

        Raises UnavailableError when it cannot be captured.
        """
        if self._stream is None or self._runs < WARM_UP:
            self._runs += 1
            return self._work()
        if self._graph is None:
            self._graph = self._capture(self._stream)
        graph, result = self._graph
        graph.replay()
        return result

    def forget(self) -> None:
        """Begin anew, with a warm-up, because the work or its memory is another one now. The device must be idle."""
        self._graph, self._runs = None, 0

    def _capture(self, stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, T]:
        """Record the work, which does none of it."""
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local", because the loader's threads pin memory meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = self._work()
        except RuntimeError as error:
            raise UnavailableError(
                f"the update cannot be captured in a CUDA graph: {first_line(error)}; use runtime.graph=off"
            ) from error
        return graph, result
