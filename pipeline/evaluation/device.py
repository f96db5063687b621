"""Where the networks of an evaluation run, and how images get there."""

import numpy as np
import torch
from torch import Tensor

from pipeline.common.imaging import Pixels
from pipeline.model.sampling import to_float


def device() -> str:
    """Return the device that networks run on: the first GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def to_network(images: Pixels) -> Tensor:
    """Images uint8 (N, H, W, C) -> float32 (N, C, H, W) in [-1, 1], on the device."""
    return to_float(torch.from_numpy(np.ascontiguousarray(images)).to(device()))
