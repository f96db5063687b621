"""The losses of one adversarial update, one file each, chosen by `recipe.loss`."""

from importlib import import_module
from typing import Protocol, cast

from torch import Tensor

from pipeline.config import LOSSES


class Loss(Protocol):
    """What the module of a loss offers. Logits are (N,), positive for real; results are scalars.

    A module in which `NEEDS_REAL_LOGITS` is true has a `generator_loss(fake_logits, real_logits)`.
    """

    @staticmethod
    def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return what D minimizes, averaged over the batch."""
        ...

    @staticmethod
    def generator_loss(*logits: Tensor) -> Tensor:
        """Return what G minimizes, averaged over the batch, from the logits of the fakes."""
        ...


def load_loss(name: str) -> Loss:
    """Return the loss that `recipe.loss` names."""
    return cast(Loss, import_module(LOSSES[name]))


def needs_real_logits(loss: Loss) -> bool:
    """Return whether G's loss reads D's logits of the real images too, which cost one more pass through D."""
    return bool(getattr(loss, "NEEDS_REAL_LOGITS", False))
