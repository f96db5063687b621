"""Zero-centered gradient penalties on D: R1 on real images, R2 on fakes (Mescheder et al. 2018, section 4.1)."""

import torch
from torch import Tensor


def leaf(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return images of their own that require gradients, in the precision in which those are to be squared."""
    return images.detach().to(dtype).requires_grad_()


def gradient_penalty(logits: Tensor, images: Tensor, gamma: float) -> Tensor:
    """Return gamma / 2 times the mean over images of the squared L2 norm of D's gradient by an image: a scalar.

    `logits` (n,) are D's of `images` (n, ...), a leaf that requires gradients. The result can be differentiated.
    With BatchNorm every logit depends on all images of the batch: the gradient is that of their sum, as everywhere.
    """
    (gradients,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradients.square().sum() * (gamma / 2 / len(images))
