"""Saver and HostMemory: a checkpoint is copied in a moment, and written in a thread while the training goes on."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Saver:
    """Does one piece of work at a time in a thread. What the work raises is raised by the next call but `busy`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether work is still being done."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work` when what was begun before is done."""
        self.wait()
        # A daemon: a disk that hangs must not keep from exiting a process that no longer waits for it.
        self._thread = threading.Thread(target=self._run, args=(work,), name="saver", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what the work has raised, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Return when the work is done."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error


class HostMemory:
    """Host copies of tensors, kept in the same places from one time to the next; pinned where a GPU's are copied."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}
        self._gpus: set[torch.device] = set()

    def copy(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return `values`, dictionaries and lists of tensors and numbers, with host copies of the tensors.

        They keep their types, shapes and strides, and hold the values of this moment until the next call.
        """
        import torch

        copied: dict[str, Any] = self._copy(values, ())
        for gpu in self._gpus:
            torch.cuda.current_stream(gpu).synchronize()
        return copied

    def _copy(self, value: Any, place: tuple[Any, ...]) -> Any:
        import torch

        if isinstance(value, dict):
            return {key: self._copy(one, (*place, key)) for key, one in value.items()}
        if isinstance(value, list):
            return [self._copy(one, (*place, index)) for index, one in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return value
        value, kept = value.detach(), self._kept.get(place)
        if kept is None or (kept.shape, kept.dtype, kept.stride()) != (value.shape, value.dtype, value.stride()):
            kept = self._kept[place] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._gpus |= {value.device} if value.is_cuda else set()
        return kept.copy_(value, non_blocking=True)
