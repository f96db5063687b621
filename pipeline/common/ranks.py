"""The processes that share one piece of work: which of them this is, and the sum over all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Ranks:
    """Rank `rank` of `world_size`. By default this process is alone."""

    rank: int = 0
    world_size: int = 1
    sum: Callable[[NDArray[Any]], NDArray[Any]] = lambda array: array
    """Returns the sum of every rank's array; all ranks must call it."""

    @property
    def main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0


ALONE = Ranks()


def ranks_of(accelerator: "Accelerator") -> Ranks:
    """Return the ranks of accelerate's process group; sums travel over its backend."""
    if accelerator.num_processes == 1:
        return ALONE
    import numpy as np
    import torch

    def sum_over_ranks(array: NDArray[Any]) -> NDArray[Any]:
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(accelerator.device)
        torch.distributed.all_reduce(tensor)
        return np.asarray(tensor.cpu().numpy())

    return Ranks(accelerator.process_index, accelerator.num_processes, sum_over_ranks)
