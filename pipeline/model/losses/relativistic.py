"""The relativistic pairing loss (Jolicoeur-Martineau 2019, RpGAN; as Huang et al. 2024 use it in R3GAN), on logits."""

import torch.nn.functional as F
from torch import Tensor

NEEDS_REAL_LOGITS = True


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return -log sigmoid(real - fake), averaged over the batch's pairs; logits (N,) -> scalar."""
    return F.softplus(fake_logits - real_logits).mean()


def generator_loss(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """Return -log sigmoid(fake - real), averaged over the batch's pairs; logits (N,) -> scalar."""
    return F.softplus(real_logits - fake_logits).mean()
