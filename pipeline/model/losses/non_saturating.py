"""The paper's loss: the non-saturating form of Goodfellow et al. 2014, section 3, on logits."""

import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return -log sigmoid(real) - log(1 - sigmoid(fake)), averaged over the batch; logits (N,) -> scalar."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return -log sigmoid(fake), averaged over the batch; logits (N,) -> scalar."""
    return F.softplus(-fake_logits).mean()
