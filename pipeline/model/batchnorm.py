"""BatchNorm statistics measured anew, in place of the moving averages that training left."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


@torch.no_grad()
def measure_statistics(network: Network, batches: Iterable[Tensor]) -> Network:
    """Replace the running BatchNorm statistics of `network` by their averages over `batches`; return it in eval mode.

    Every batch weighs the same, so give batches of one size. A network without BatchNorm reads none of them.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # PyTorch's way to ask for the average of all batches
    if norms:
        network.train()
        for batch in batches:
            network(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()
