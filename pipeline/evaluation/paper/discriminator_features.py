"""The discriminator as a feature extractor (section 5.1 of the paper)."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from pipeline.common.errors import UsageError
from pipeline.config import NetworkConfig
from pipeline.evaluation.classifier import to_network
from pipeline.evaluation.images import Pixels
from pipeline.evaluation.inputs import device
from pipeline.model.networks import Discriminator, build_discriminator, initialize

POOLED = 4
BATCH = 128
RANDOM_LANE = 99


@torch.no_grad()
def features(network: Discriminator, images: Pixels, batch: int = BATCH) -> NDArray[np.float32]:
    """Return (N, 16 * sum of widths): every layer's activations, max-pooled to 4x4, flattened and joined."""
    rows = []
    for start in range(0, len(images), batch):
        maps = network.activations(to_network(images[start : start + batch]))
        rows.append(torch.cat([F.adaptive_max_pool2d(m, POOLED).flatten(1) for m in maps], 1).cpu())
    return np.asarray(torch.cat(rows).numpy(), np.float32)


@torch.no_grad()
def reestimate_batchnorm(network: Discriminator, images: Pixels) -> Discriminator:
    """Replace D's BatchNorm statistics by averages over real images and freeze them, as the authors' code does.

    In training the running statistics mix real and fake batches; a probe sees real images only.
    """
    if len(images) <= BATCH // 2:
        raise UsageError(f"{len(images)} images are too few for BatchNorm statistics: expected more than {BATCH // 2}")
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    network.train()
    for start in range(0, len(images) - BATCH // 2, BATCH):  # a small last batch would weigh too much
        network(to_network(images[start : start + BATCH]))
    return network.eval()


def random_discriminator(config: NetworkConfig, seed: int) -> Discriminator:
    """Return an untrained discriminator of the same architecture: what its features are worth without learning."""
    network = build_discriminator(config)
    initialize(network, seed, lane=RANDOM_LANE)
    return network.to(device()).requires_grad_(False)
