"""The base of samplers on an NVIDIA GPU: streams, pinned host memory, and work ahead of the consumer."""

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from export.samplers.base import Sampler
from pipeline.common.errors import UnavailableError
from pipeline.config import NetworkConfig

WARM_UP_LAUNCHES = 3
"""Launches before a capture, so that lazy initialization (cuDNN's plans, workspaces) is not recorded."""


class CudaSampler(Sampler):
    """Computes one block while it copies the previous images to the host and the next z to the device.

    `_launch` reads the device buffer `_z`, float32 (batch, row_dim), and writes `_images`, uint8 (batch, H, W, C),
    on the current stream. Pinned host memory comes from PyTorch's caching allocator, which uses a block again once
    the consumer has dropped it.
    """

    works_ahead = True
    ahead = 3
    """Blocks in flight."""

    def __init__(self, network: NetworkConfig, batch: int, model_sha256: str) -> None:
        super().__init__(network, batch, model_sha256)
        self.device = torch.cuda.get_device_name()
        shape = (batch, *network.image_shape)
        self._compute = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._copy = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._compute):
            self._z = torch.zeros((batch, self.row_dim), device="cuda")
            self._images = torch.zeros(shape, dtype=torch.uint8, device="cuda")
        self._graph: torch.cuda.CUDAGraph | None = None

    @abstractmethod
    def _launch(self) -> None:
        """Enqueue the work of one block on the current stream."""

    def stream(self, blocks: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.uint8]]:
        """Yield the images of each block, with `ahead` of them in flight."""
        in_flight: deque[tuple[torch.Tensor, torch.cuda.Event, int]] = deque()
        for z in blocks:
            in_flight.append(self._submit(z))
            if len(in_flight) >= self.ahead:
                yield _collect(*in_flight.popleft())
        while in_flight:
            yield _collect(*in_flight.popleft())

    def time_launches(self, count: int) -> list[float]:
        """Return the seconds between CUDA events before and after a launch, `count` times."""
        events = [[_timed_event(), _timed_event()] for _ in range(count)]
        with torch.cuda.stream(self._compute):
            for before, after in events:
                before.record()
                self._launch()
                after.record()
        self._compute.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in events]

    def _run(self, z: NDArray[np.float32]) -> NDArray[np.uint8]:
        return _collect(*self._submit(z))

    def _submit(self, z: NDArray[np.float32]) -> tuple[torch.Tensor, torch.cuda.Event, int]:
        """Enqueue a block; return its host images, the event that marks them ready, and the number of real rows."""
        with memory_errors(self.batch):
            host_z = torch.from_numpy(self._pad(z)).pin_memory()
            with torch.cuda.stream(self._compute):
                self._z.copy_(host_z, non_blocking=True)
                self._launch()
                images = self._images.clone()  # the next launch may overwrite `_images` during the copy
                computed = self._compute.record_event()
            host_images = torch.empty(images.shape, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(self._copy):
            self._copy.wait_event(computed)
            host_images.copy_(images, non_blocking=True)
            images.record_stream(self._copy)  # its memory must not be reused before the copy
            copied = self._copy.record_event()
        return host_images, copied, len(z)

    def _warm_up(self, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with torch.cuda.stream(self._compute):
            for _ in range(WARM_UP_LAUNCHES):
                self._images = forward(self._z)
        self._compute.synchronize()

    def _capture(self, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Record one launch. `_images` becomes the graph's own output buffer."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: an unrelated thread (a loader, a metrics server) may use CUDA meanwhile.
        with torch.cuda.graph(graph, stream=self._compute, capture_error_mode="thread_local"):
            self._images = forward(self._z)
        self._graph = graph

    def close(self) -> None:
        """Wait for the device, and free the graph before the buffers that it points to."""
        torch.cuda.synchronize()
        self._graph = None


@contextmanager
def memory_errors(batch: int) -> Iterator[None]:
    """Turn "out of memory" of PyTorch and CUDA into a one-line error."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; pinned memory raises its parent
        if "out of memory" not in str(error):
            raise
        raise UnavailableError(
            f"the GPU has too little free memory for blocks of {batch} images: choose a smaller --batch, or stop "
            "the other programs on the GPU"
        ) from None


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _collect(host_images: torch.Tensor, copied: torch.cuda.Event, count: int) -> NDArray[np.uint8]:
    copied.synchronize()
    images: NDArray[np.uint8] = host_images[:count].numpy()
    return images
