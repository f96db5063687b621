"""The discriminator as a feature extractor (section 5.1 of the paper), trained and untrained."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.common.errors import UsageError
from pipeline.common.imaging import Pixels
from pipeline.config import NetworkConfig
from pipeline.evaluation.device import device, to_network
from pipeline.model.batchnorm import measure_statistics
from pipeline.model.networks import Discriminator, build_discriminator, initialize

POOLED = 4
BATCH = 128
RANDOM_LANE = 99


@torch.no_grad()
def features(network: Discriminator, images: Pixels, batch: int = BATCH) -> NDArray[np.float32]:
    """Return (N, 16 * the sum of `activation_widths`): every layer's maps max-pooled to 4x4, flattened and joined."""
    rows = []
    for start in range(0, len(images), batch):
        maps = network.activations(to_network(images[start : start + batch]))
        rows.append(torch.cat([F.adaptive_max_pool2d(m, POOLED).flatten(1) for m in maps], 1).cpu())
    return np.asarray(torch.cat(rows).numpy(), np.float32)


def measure_batchnorm(network: Discriminator, images: Pixels) -> Discriminator:
    """Replace D's BatchNorm statistics by averages over real images; return it in eval mode. As the authors' code does.

    In training the running statistics mix real and fake batches; a probe sees real images only.
    """
    if len(images) <= BATCH // 2:
        raise UsageError(f"{len(images)} images are too few for BatchNorm statistics: expected more than {BATCH // 2}")
    starts = range(0, len(images) - BATCH // 2, BATCH)  # a small last batch would weigh too much
    batches = (to_network(images[start : start + BATCH]) for start in starts)
    if not network.config.label:
        return measure_statistics(network, batches)
    no_label = torch.zeros(BATCH, network.config.label_dim, device=device())  # it reaches the logits alone
    return measure_statistics(network, ((batch, no_label[: len(batch)]) for batch in batches))


def random_discriminator(config: NetworkConfig, seed: int) -> Discriminator:
    """Return an untrained discriminator of the same architecture: the baseline of its trained features."""
    network = build_discriminator(config)
    initialize(network, seed, lane=RANDOM_LANE)
    return network.to(device()).requires_grad_(False)
