"""The `netG_epoch_N.pth` of pytorch/examples' DCGAN, read without running code."""

import io
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pipeline.common.errors import DataError, first_line
from pipeline.config import NetworkConfig

if TYPE_CHECKING:
    from torch import Tensor


def read_examples(data: bytes, source: str) -> tuple[NetworkConfig, dict[str, "Tensor"]]:
    """Return the configuration and tensors of a `netG_epoch_N.pth`: recognized by its keys, z ~ N(0, 1).

    Raises DataError for anything else.
    """
    import torch

    expected = "expected the state_dict of pytorch/examples' DCGAN generator (main.0.weight, main.1.weight, ...)"
    try:
        loaded: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        line = first_line(error)
        raise DataError(f"{source}: cannot be read without running code ({line}); {expected}") from None
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
    ):
        raise DataError(f"{source}: holds {type(loaded).__name__}, {expected}")
    tensors = {name.removeprefix("module.").replace("main.", "layers.", 1): value for name, value in loaded.items()}
    convolutions = [value for value in tensors.values() if value.ndim == 4]
    first = tensors.get("layers.0.weight")
    if first is None or first.ndim != 4 or any(value.shape[2:] != (4, 4) for value in convolutions):
        raise DataError(f"{source}: found the keys {', '.join(list(loaded)[:3])}, ...; {expected}")
    try:
        config = NetworkConfig.model_validate(
            {
                "image_size": 4 << (len(convolutions) - 1),
                "channels": convolutions[-1].shape[1],
                "width": convolutions[-1].shape[0],
                "latent_dim": convolutions[0].shape[0],
                "latent_distribution": "normal",
            }
        )
    except ValidationError as error:
        raise DataError(f"{source}: {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}; {expected}") from None
    return config, tensors
