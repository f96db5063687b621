"""The weights of one network in an update: their gradients, whether those are finite, and the optimizer's step."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.spectral import Spectral


def lowered(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a network that shares all with `network` but the weights of its convolutions, which are of `dtype`.

    Autocast would cast each of them in each pass, and each of their gradients. It still casts what spectral
    normalization divides first, in float32.
    """
    kinds = (nn.modules.batchnorm._BatchNorm, Spectral)
    shared = [module for module in network.modules() if isinstance(module, kinds)]
    copied = copy.deepcopy(network, {id(module): module for module in shared})
    for module in copied.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and not isinstance(module, Spectral):
            module.to(dtype)
    return copied


class Weights:
    """What an optimizer changes, in the order of `network.parameters()`, and what the passes use in its place."""

    def __init__(self, network: nn.Module, passes: nn.Module, optimizer: torch.optim.Adam, scaler: Any) -> None:
        """`passes` is `network`, or what `lowered` made of it; `scaler` fp16's `torch.amp.GradScaler`, or None.

        Weights that require no gradient by now are frozen: they only take part in the passes.
        """
        self.tensors: list[Tensor] = list(network.parameters())
        pairs: list[tuple[Tensor, Tensor]] = list(zip(self.tensors, passes.parameters(), strict=True))
        self._used: list[Tensor] = [used for master, used in pairs if master.requires_grad]
        pairs = [pair for pair in pairs if pair[0] is not pair[1]]
        self._masters, self._lowered = [master for master, _ in pairs], [low for _, low in pairs]
        self._trained = [pair for pair in pairs if pair[0].requires_grad]
        self._gradients = [torch.zeros_like(master) for master, _ in self._trained]
        self._optimizer = optimizer
        self._scaler = scaler
        self.found_inf = torch.zeros((), dtype=torch.float32, device=self.tensors[0].device)
        """1 when the gradients of the last update were not finite, else 0."""
        if scaler is None and optimizer.defaults["fused"]:
            optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]  # the fused kernel then changes nothing

    @torch.no_grad()
    def cast(self) -> None:
        """Give the passes the weights as they are now."""
        if self._lowered:
            torch._foreach_copy_(self._lowered, self._masters)

    def require_gradients(self, wanted: bool) -> None:
        """Let the next passes compute gradients of these weights, or not."""
        for weight in self._used:
            weight.requires_grad = wanted

    @torch.no_grad()
    def apply(self) -> Tensor:
        """Step and clear the gradients; return their L2 norm, a scalar.

        An update with gradients that are not finite changes nothing, if the optimizer is fused or has a scaler.
        Gradients are equal on all ranks by now, so all ranks skip the same updates, and none has to ask.
        """
        if self._trained:
            torch._foreach_copy_(self._gradients, gradients_of([low for _, low in self._trained]))
            for (master, _), gradient in zip(self._trained, self._gradients, strict=True):
                master.grad = gradient
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients_of(self.tensors))))
        torch.ne(norm - norm, 0.0, out=self.found_inf)  # of infinity and NaN the difference is NaN
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
            norm = torch.where(torch.isfinite(norm), norm, 0.0)  # one overflow would make the interval's mean infinite
        for weight in self._used:
            weight.grad = None
        return norm


def gradients_of(weights: list[Tensor]) -> list[Tensor]:
    """Return the gradients of those weights that have one."""
    return [weight.grad for weight in weights if weight.grad is not None]
