"""BatchNorm without a counter, and its statistics measured anew in place of the moving averages of training."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class BatchNorm2d(nn.BatchNorm2d):
    """PyTorch's, with the same state, but `num_batches_tracked` stays what it is: only a momentum of None reads it.

    Counting would be one operation for each layer and pass, 13 of an update.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Normalize maps (N, channels, h, w)."""
        if self.momentum is None:
            return super().forward(maps)
        affine, statistics = (self.weight, self.bias), (self.running_mean, self.running_var)
        if not self.training or (maps.is_cuda and maps.dtype != torch.bfloat16):  # cuDNN has kernels of its own
            return nn.functional.batch_norm(maps, *statistics, *affine, self.training, self.momentum, self.eps)
        # What PyTorch would choose too, without an operation for a reserve that only cuDNN uses.
        return torch.native_batch_norm(maps, *affine, *statistics, True, self.momentum, self.eps)[0]


@torch.no_grad()
def measure_statistics(network: Network, batches: Iterable[Tensor | tuple[Tensor, ...]]) -> Network:
    """Replace the running BatchNorm statistics of `network` by their averages over `batches`; return it in eval mode.

    A batch is the network's input, or a tuple of its inputs. Every batch weighs the same, so give batches of one size.
    A network without BatchNorm reads none of them.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # PyTorch's way to ask for the average of all batches
    if norms:
        network.train()
        for batch in batches:
            network(*batch) if isinstance(batch, tuple) else network(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()
