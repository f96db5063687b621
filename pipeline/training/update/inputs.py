"""The fixed memory that an update reads its images and z from, and how they get there while the one before runs."""

from itertools import cycle
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SLOTS = 2
"""Batches on their way to a GPU: one is copied while the update on the other runs."""


class Inputs:
    """One rank's share of a batch, always at the same place of the device.

    `reals` are uint8 (n, height, width, channels); `z` is (n, latent_dim) in the dtype that the networks take,
    `chances` (n, values) in that of their weights. `labels` are (n, 2 * label_dim) in the dtype of z: of the real
    images, then of the fakes.
    """

    def __init__(
        self,
        reals_shape: tuple[int, ...],
        latent_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        values: int = 0,
        values_dtype: torch.dtype = torch.float32,
        label_dim: int = 0,
    ) -> None:
        self.reals = torch.zeros(reals_shape, dtype=torch.uint8, device=device)
        self.z = torch.zeros((reals_shape[0], latent_dim), dtype=dtype, device=device)
        self.chances = torch.zeros((reals_shape[0], values), dtype=values_dtype, device=device)
        self.labels = torch.zeros((reals_shape[0], 2 * label_dim), dtype=dtype, device=device)
        self._slots = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._slots = cycle([_Slot(self.reals), _Slot(self.reals)])
            self._z_slots = cycle([_Slot(self.z), _Slot(self.z)])
            self._chance_slots = cycle([_Slot(self.chances), _Slot(self.chances)] if values else ())
            self._label_slots = cycle([_Slot(self.labels), _Slot(self.labels)] if label_dim else ())

    def feed(
        self,
        reals: NDArray[np.uint8] | Tensor,
        z: NDArray[np.float32] | Tensor,
        chances: NDArray[np.float32] | None = None,
        labels: NDArray[np.float32] | None = None,
    ) -> None:
        """Replace what is there; `chances` and `labels` are left out where there are none.

        The host waits only for a copy that it began two batches ago. Called on the stream of the update, which then
        waits for the copies. Tensors of the device are copied there.
        """
        self._feed(self.reals, reals, self._slots)
        self._feed(self.z, z, self._z_slots if self._slots else None)
        if chances is not None:
            self._feed(self.chances, chances, self._chance_slots if self._slots else None)
        if labels is not None:
            self._feed(self.labels, labels, self._label_slots if self._slots else None)

    def _feed(self, buffer: Tensor, values: NDArray[Any] | Tensor, slots: Any) -> None:
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
        assert tensor.shape == buffer.shape, f"{tuple(tensor.shape)} does not fit {tuple(buffer.shape)}"
        if slots is None or tensor.is_cuda:
            buffer.copy_(tensor)
        else:
            next(slots).carry(tensor, buffer, self._stream)


class _Slot:
    """Memory for one batch on the host, pinned, and on the GPU."""

    def __init__(self, buffer: Tensor) -> None:
        self._host = torch.zeros_like(buffer, device="cpu").pin_memory()
        self._device = torch.zeros_like(buffer)
        self._arrived, self._used = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]

    def carry(self, tensor: Tensor, buffer: Tensor, stream: torch.cuda.Stream) -> None:
        """Copy a tensor of the host to the GPU on `stream`, and from there to `buffer` on the current one."""
        current = torch.cuda.current_stream(buffer.device)
        self._arrived.synchronize()
        if not tensor.is_pinned():  # the loader's batches are; their allocator keeps them until they have been copied
            tensor = self._host.copy_(tensor)
        with torch.cuda.stream(stream):
            stream.wait_event(self._used)
            self._device.copy_(tensor, non_blocking=True)
            self._arrived.record(stream)
        current.wait_event(self._arrived)
        buffer.copy_(self._device, non_blocking=True)
        self._used.record(current)
