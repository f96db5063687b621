"""The losses of one adversarial update, one file each, chosen by `recipe.loss`."""

from importlib import import_module
from typing import Protocol, cast

from torch import Tensor

from pipeline.config import LOSSES


class Loss(Protocol):
    """What the module of a loss offers. Logits are (N,), positive for real; results are scalars."""

    @staticmethod
    def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return what D minimizes, averaged over the batch."""
        ...

    @staticmethod
    def generator_loss(fake_logits: Tensor) -> Tensor:
        """Return what G minimizes, averaged over the batch."""
        ...


def load_loss(name: str) -> Loss:
    """Return the loss that `recipe.loss` names."""
    return cast(Loss, import_module(LOSSES[name]))
