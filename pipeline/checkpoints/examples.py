"""The `netG_epoch_N.pth` and `netD_epoch_N.pth` of pytorch/examples' DCGAN, read without running code."""

import io
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from pipeline.common.errors import DataError, first_line
from pipeline.config import NetworkConfig

if TYPE_CHECKING:
    from torch import Tensor


SUFFIXES = (".pth", ".pt")
"""How the names of such files end."""


def read_examples(data: bytes, source: str) -> tuple[NetworkConfig, dict[str, "Tensor"]]:
    """Return the configuration and tensors of a `netG_epoch_N.pth`: recognized by its keys, z ~ N(0, 1).

    Raises DataError for anything else.
    """
    expected = "expected the state_dict of pytorch/examples' DCGAN generator (main.0.weight, main.1.weight, ...)"
    tensors = _read(data, source, expected)
    convolutions = _convolutions(tensors)
    first = tensors.get("layers.0.weight")
    if first is None or first.ndim != 4 or any(value.shape[2:] != (4, 4) for value in convolutions):
        raise DataError(f"{source}: found the keys {_keys(tensors)}; {expected}")
    found = {"channels": convolutions[-1].shape[1], "width": convolutions[-1].shape[0]}
    found["latent_dim"] = convolutions[0].shape[0]
    return _config(found, convolutions, source, expected), tensors


def read_examples_network(data: bytes, source: str) -> tuple[Literal["netG", "discriminator"], NetworkConfig, Any]:
    """Return what a `netG_epoch_N.pth` or `netD_epoch_N.pth` holds, its configuration and its tensors by our names.

    A netD does not say what its latents are: those of its configuration are the defaults. Raises DataError for
    anything else.
    """
    expected = "expected the state_dict of pytorch/examples' DCGAN (main.0.weight, ...), a netG or a netD"
    tensors = _read(data, source, expected)
    convolutions = _convolutions(tensors)
    discriminator = "layers.1.weight" not in tensors and convolutions and convolutions[-1].shape[0] == 1
    if not discriminator:
        return "netG", *read_examples(data, source)
    if "layers.0.weight" not in tensors or any(value.shape[2:] != (4, 4) for value in convolutions):
        raise DataError(f"{source}: found the keys {_keys(tensors)}; {expected}")
    last = next(name for name, value in tensors.items() if value is convolutions[-1])
    tensors = {"head.weight" if name == last else name: value for name, value in tensors.items()}
    found = {"channels": convolutions[0].shape[1], "width": convolutions[0].shape[0]}
    return "discriminator", _config(found, convolutions, source, expected), tensors


def _read(data: bytes, source: str, expected: str) -> dict[str, "Tensor"]:
    """Return the tensors of a file by our names."""
    import torch

    try:
        loaded: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        line = first_line(error)
        raise DataError(f"{source}: cannot be read without running code ({line}); {expected}") from None
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
    ):
        raise DataError(f"{source}: holds {type(loaded).__name__}, {expected}")
    return {name.removeprefix("module.").replace("main.", "layers.", 1): value for name, value in loaded.items()}


def _convolutions(tensors: dict[str, "Tensor"]) -> list["Tensor"]:
    return [value for value in tensors.values() if value.ndim == 4]


def _keys(tensors: dict[str, "Tensor"]) -> str:
    return ", ".join(name.replace("layers.", "main.", 1) for name in list(tensors)[:3]) + ", ..."


def _config(found: dict[str, int], convolutions: list["Tensor"], source: str, expected: str) -> NetworkConfig:
    """Return the network whose sizes were found; one convolution more than it has doublings."""
    size = {"image_size": 4 << (len(convolutions) - 1), "latent_distribution": "normal"}
    try:
        return NetworkConfig.model_validate({**found, **size})
    except ValidationError as error:
        raise DataError(f"{source}: {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}; {expected}") from None
