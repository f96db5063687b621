"""Weights in safetensors that say what they are; and every form of `--ckpt` turned into a network."""

import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from pipeline.common.errors import DataError
from pipeline.common.storage import Store, sha256_bytes
from pipeline.config import NetworkConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.model.networks import Discriminator, Generator

Kind = Literal["ema", "raw", "netG", "discriminator"]
FILE_OF_KIND = {
    "ema": "generator_ema.safetensors",
    "raw": "generator.safetensors",
    "discriminator": "discriminator.safetensors",
}


@dataclass(frozen=True)
class LoadedGenerator:
    """A generator ready for use, and where it came from."""

    generator: "Generator"
    """On the CPU, float32, in eval mode."""
    config: NetworkConfig
    source: str
    """The file that was read in the end: a URL or an absolute path, since it goes into cards that travel."""
    sha256: str
    """Of that file."""
    images_seen: int | None
    """Real images seen in training, where the file tells."""
    kind: Kind


@dataclass(frozen=True)
class LoadedDiscriminator:
    """A discriminator ready for use, and where it came from."""

    discriminator: "Discriminator"
    """On the CPU, float32, in eval mode."""
    config: NetworkConfig
    source: str
    sha256: str
    images_seen: int | None


METADATA_KEY = "dcgan"


def serialize(network: "nn.Module", config: NetworkConfig, kind: Kind, images_seen: int) -> bytes:
    """Return the state of `network` as safetensors bytes whose metadata say what it is."""
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    card = {"network": config.model_dump(), "kind": kind, "images_seen": images_seen}
    # One key: safetensors writes several in random order, and equal weights shall be equal files.
    return save(state, {METADATA_KEY: json.dumps(card)})


def deserialize(data: bytes, source: str) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Return the tensors of safetensors bytes and what `serialize` said of them; DataError when they are damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        card: Any = json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, ValueError) as error:
        raise DataError(f"{source}: not a whole safetensors file ({error}); copy it again") from None
    return tensors, card if isinstance(card, dict) else {}


def load_generator(reference: str) -> LoadedGenerator:
    """Return the generator that `reference` names (DESIGN contract 4).

    A run directory (its best checkpoint, else its last; `RUN@last`, `RUN@best` or `RUN@IMAGES` choose), a
    checkpoint directory, a generator's `.safetensors`, or a `netG_epoch_N.pth` of pytorch/examples; paths
    and URLs of these. The EMA weights are taken where there are any.

    Raises DataError that says what was found there instead.
    """
    source, data = _read(reference, "ema")
    if source.endswith((".pth", ".pt")):
        return _from_examples(data, source)
    tensors, card = deserialize(data, source)
    if card.get("kind") not in ("ema", "raw"):
        raise DataError(f"{source}: holds {card.get('kind', 'weights of another project')}, expected a generator")
    from pipeline.model.networks import Generator

    config = _network_config(card, source)
    generator = Generator(config)
    _fill(generator, tensors, source)
    kind: Kind = "ema" if card["kind"] == "ema" else "raw"
    return LoadedGenerator(generator, config, source, sha256_bytes(data), card.get("images_seen"), kind)


def load_discriminator(reference: str) -> LoadedDiscriminator:
    """Return the discriminator that `reference` names: a run, a checkpoint, or a discriminator's `.safetensors`."""
    source, data = _read(reference, "discriminator")
    tensors, card = deserialize(data, source)
    if card.get("kind") != "discriminator":
        raise DataError(f"{source}: holds {card.get('kind', 'weights of another project')}, expected a discriminator")
    from pipeline.model.networks import Discriminator

    config = _network_config(card, source)
    discriminator = Discriminator(config)
    _fill(discriminator, tensors, source)
    return LoadedDiscriminator(discriminator, config, source, sha256_bytes(data), card.get("images_seen"))


def _read(reference: str, kind: Kind) -> tuple[str, bytes]:
    """Return the URL or absolute path of the weights of `kind` that a `--ckpt` value means, and their bytes."""
    store, name = _resolve(reference, kind)
    return store.path(name) if store.remote else os.path.abspath(store.path(name)), store.read(name)


def _resolve(reference: str, kind: Kind) -> tuple[Store, str]:
    """Return the store and file name of the weights of `kind` that a `--ckpt` value means."""
    from pipeline.checkpoints.store import CheckpointStore

    if re.search(r"\.(safetensors|pth|pt)$", reference):
        folder, _, name = reference.rpartition("/")
        return Store(folder or ("/" if reference.startswith("/") else ".")), name
    location, _, choice = (
        reference.partition("@") if re.search(r"@(best|last|\d+)$", reference) else (reference, "", "")
    )
    store = Store(location)
    if not store.remote and not Path(store.location).exists():
        raise DataError(f"--ckpt {reference}: nothing there; expected a run, a checkpoint, or a weights file")
    if store.exists("state.json"):
        parent, _, here = str(store.location).rpartition("/")
        checkpoints = CheckpointStore(Store(parent or "."), folder="")
        checkpoints.verify(here, FILE_OF_KIND[kind])
        return store, FILE_OF_KIND[kind]
    checkpoints = CheckpointStore(store)
    chosen = checkpoints.choose(choice)
    if chosen is None:
        what = f"no checkpoint {choice!r} in it" if choice and checkpoints.names() else "no finished checkpoint in it"
        have = ", ".join(checkpoints.names()) or "none"
        raise DataError(f"--ckpt {reference}: {what} (finished: {have}); expected a run that has saved at least once")
    checkpoints.verify(chosen, FILE_OF_KIND[kind])
    return store, f"{checkpoints.folder}/{chosen}/{FILE_OF_KIND[kind]}"


def _network_config(card: dict[str, Any], source: str) -> NetworkConfig:
    try:
        return NetworkConfig.model_validate(card.get("network"))
    except ValidationError as error:
        raise DataError(f"{source}: its network is of another version: {error.errors()[0]['msg']}") from None


def _fill(network: "nn.Module", tensors: dict[str, "Tensor"], source: str) -> None:
    """Load `tensors` into `network` and put it into eval mode."""
    import torch

    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise DataError(
            f"{source}: its weights are not finite ({broken[0]}): the training diverged; use an earlier checkpoint"
        )
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise DataError(f"{source}: the weights do not fit the network they name: {detail}") from None
    network.eval()


def _from_examples(data: bytes, source: str) -> LoadedGenerator:
    """Read a `netG_epoch_N.pth` of pytorch/examples: recognized by its keys, sizes inferred, z ~ N(0, 1)."""
    import torch

    from pipeline.model.networks import Generator

    expected = "expected the state_dict of pytorch/examples' DCGAN generator (main.0.weight, main.1.weight, ...)"
    try:
        loaded: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
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
    generator = Generator(config)
    _fill(generator, tensors, source)
    return LoadedGenerator(generator, config, source, sha256_bytes(data), None, "netG")
