"""Weights in safetensors that say what they are: networks to bytes, and bytes to tensors."""

import json
from typing import TYPE_CHECKING, Any, Literal

from pipeline.common.errors import DataError
from pipeline.common.records import parse_json
from pipeline.config import NetworkConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn


Kind = Literal["ema", "raw", "netG", "discriminator"]
FILE_OF_KIND = {
    "ema": "generator_ema.safetensors",
    "raw": "generator.safetensors",
    "discriminator": "discriminator.safetensors",
}


PUBLISHED, PUBLISHED_WEIGHTS = "config.json", "generator.safetensors"
"""What a folder for the Hub is recognized by, and the file in it that has the generator."""

METADATA_KEY = "dcgan"
INIT_FROM = "init_from"
"""The entry of a weights file, a state.json and a config.json of what the run began from, if not from noise."""


def is_published(config: object) -> bool:
    """Whether `config`, the content of a config.json, is that of a folder that `dcgan-export hub` wrote."""
    return isinstance(config, dict) and config.get("weights") == PUBLISHED_WEIGHTS and "library_name" in config


def serialize(network: "nn.Module", config: NetworkConfig, kind: Kind, images_seen: int) -> bytes:
    """Return the state of `network` as safetensors bytes whose metadata say what it is."""
    return serialize_state(network.state_dict(), config, kind, images_seen)


def serialize_state(
    tensors: "Mapping[str, Tensor]",
    config: NetworkConfig,
    kind: Kind,
    images_seen: int | None,
    init_from: "Sequence[str]" = (),
) -> bytes:
    """Return the tensors of a network's state as `serialize` does.

    `init_from` are the SHA-256 of the files whose weights the training began from.
    """
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    card: dict[str, Any] = {"network": config.model_dump(), "kind": kind, "images_seen": images_seen}
    card |= {INIT_FROM: list(init_from)} if init_from else {}
    # One key: safetensors writes several in random order, and equal weights shall be equal files.
    return save(state, {METADATA_KEY: json.dumps(card)})


def deserialize(data: bytes, source: str) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Return the tensors of safetensors bytes and what `serialize` said of them; DataError when they are damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:  # the last for a type of numbers that torch has not
        raise DataError(f"{source}: not a whole safetensors file ({error}); copy it again") from None
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], source)
    card = parse_json((header.get("__metadata__") or {}).get(METADATA_KEY, "{}"), source, nan=True)
    return tensors, card if isinstance(card, dict) else {}
