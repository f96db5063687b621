"""The hinge loss (Lim and Ye 2017, Geometric GAN, equation 5), on logits."""

import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return max(0, 1 - real) + max(0, 1 + fake), averaged over the batch; logits (N,) -> scalar."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return -fake, averaged over the batch; logits (N,) -> scalar."""
    return -fake_logits.mean()
