"""Every form of `--ckpt`, found and turned into a network."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from pipeline.checkpoints.examples import file_format, read_others
from pipeline.checkpoints.store import CHECKPOINTS, STATE, CheckpointStore
from pipeline.checkpoints.weights import (
    FILE_OF_KIND,
    INIT_FROM,
    PUBLISHED,
    PUBLISHED_WEIGHTS,
    Kind,
    deserialize,
    is_published,
)
from pipeline.common.errors import DataError
from pipeline.common.records import LARGEST, first_problem, parse_json
from pipeline.common.storage import Store, is_url, locate, public_name, sha256_bytes
from pipeline.config import NetworkConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.model.networks import Discriminator, Generator

N = TypeVar("N", bound="nn.Module")
_SHA256 = re.compile(r"[0-9a-f]{64}")

WEIGHTS_FILE = re.compile(r"\.(safetensors|pth|pt)$", re.IGNORECASE)
"""Names that mean a file even where none is there. What another file holds, its content tells."""


@dataclass(frozen=True)
class LoadedGenerator:
    """A generator ready for use, and where it came from."""

    generator: "Generator"
    """On the CPU, float32, in eval mode."""
    config: NetworkConfig
    source: str
    """The file that was read in the end: a URL or an absolute path, for messages."""
    sha256: str
    """Of that file."""
    images_seen: int | None
    """Real images seen in training, where the file tells."""
    kind: Kind
    init_from: list[str] = field(default_factory=list)
    """SHA-256 of the files whose weights its training began from, where it did not begin from noise."""

    @property
    def reference(self) -> str:
        """The file as cards and results name it."""
        return public_reference(self.source)


@dataclass(frozen=True)
class LoadedDiscriminator:
    """A discriminator ready for use, and where it came from."""

    discriminator: "Discriminator"
    """On the CPU, float32, in eval mode."""
    config: NetworkConfig
    source: str
    sha256: str
    images_seen: int | None

    @property
    def reference(self) -> str:
        """The file as results name it."""
        return public_reference(self.source)


def public_reference(source: str) -> str:
    """Return the name of a weights file for files that travel: `RUN/checkpoints/POSITION/FILE`, or FILE alone.

    A card is made to be published, and must not say where on whose machine the weights lay. Their SHA-256 says which
    they are.
    """
    if is_url(source):
        return public_name(source)
    parts = Path(source).parts
    return "/".join(parts[-4:]) if parts[-3:-2] == (CHECKPOINTS,) else parts[-1]


def load_generator(reference: str) -> LoadedGenerator:
    """Return the generator that `reference` names (docs/architecture.md, contract 4).

    A run directory (its best checkpoint, else its last; `RUN@last`, `RUN@best` or `RUN@IMAGES` choose), a
    checkpoint directory, a folder of `dcgan-export hub`, a generator's `.safetensors`, or the file of another
    project's DCGAN, such as a `netG_epoch_N.pth` of pytorch/examples (`pipeline.checkpoints.examples`); paths and
    URLs of these. The EMA weights are taken where there are any.

    Raises DataError that says what was found there instead.
    """
    from pipeline.model.networks import build_generator

    source, data = read_weights(reference, "ema")
    ours = read_own(data, source)
    if ours is None:
        config, tensors = read_others(data, source, "generator")
        generator = _filled(build_generator, config, tensors, source)
        return LoadedGenerator(generator, config, source, sha256_bytes(data), None, "netG")
    tensors, card = ours
    if card.get("kind") not in ("ema", "raw"):
        raise DataError(f"{source}: holds {card.get('kind', 'weights of another project')}, expected a generator")
    config = network_config(card, source)
    generator = _filled(build_generator, config, tensors, source)
    kind: Kind = "ema" if card["kind"] == "ema" else "raw"
    began = _init_from(card, source)
    return LoadedGenerator(generator, config, source, sha256_bytes(data), _images_seen(card, source), kind, began)


def load_discriminator(reference: str) -> LoadedDiscriminator:
    """Return the discriminator that `reference` names: a run, a checkpoint, a file of ours or of another project.

    Beside a `netG_epoch_N.pth`, or another file with a generator's name, that is the file with the discriminator's.
    """
    from pipeline.model.networks import build_discriminator

    source, data = read_weights(_beside(reference), "discriminator")
    ours = read_own(data, source)
    if ours is None:
        config, tensors = read_others(data, source, "discriminator")
        discriminator = _filled(build_discriminator, config, tensors, source)
        return LoadedDiscriminator(discriminator, config, source, sha256_bytes(data), None)
    tensors, card = ours
    if card.get("kind") != "discriminator":
        raise DataError(f"{source}: holds {card.get('kind', 'weights of another project')}, expected a discriminator")
    config = network_config(card, source)
    discriminator = _filled(build_discriminator, config, tensors, source)
    return LoadedDiscriminator(discriminator, config, source, sha256_bytes(data), _images_seen(card, source))


def _beside(reference: str) -> str:
    """Return the discriminator's file that lies beside the generator's file `reference`, if there is one."""
    if WEIGHTS_FILE.search(reference):
        for generator, discriminator in (("netG", "netD"), ("generator", "discriminator")):
            folder, slash, name = reference.rpartition("/")
            other = f"{folder}{slash}{name.replace(generator, discriminator)}"
            if other != reference and locate(other)[0].exists(locate(other)[1]):
                return other
    return reference


def read_own(data: bytes, source: str) -> tuple[dict[str, "Tensor"], dict[str, Any]] | None:
    """Return tensors and description of a weights file of this project; None for another project's.

    Raises DataError when the content is neither safetensors nor PyTorch's format.
    """
    suffix = source.lower().rpartition(".")[2]
    kind = file_format(data[:9])
    if kind is None and suffix not in ("safetensors", "pth", "pt"):
        raise DataError(f"{source}: neither a safetensors nor a file of torch.save; expected weights")
    if suffix != "safetensors" and kind != "safetensors":
        return None
    tensors, card = deserialize(data, source)
    return (tensors, card) if card else None


def is_weights_file(reference: str) -> bool:
    """Return whether `reference` names the weights of one network, not a run or a checkpoint."""
    return bool(WEIGHTS_FILE.search(reference)) or (not is_url(reference) and os.path.isfile(reference))


def read_weights(reference: str, kind: Kind, *, option: str = "--ckpt") -> tuple[str, bytes]:
    """Return the URL or absolute path of the weights of `kind` that the value of `option` means, and their bytes."""
    store, name = _resolve(reference, kind, option)
    return store.path(name) if store.remote else os.path.abspath(store.path(name)), store.read(name)


def _resolve(reference: str, kind: Kind, option: str) -> tuple[Store, str]:
    """Return the store and file name of the weights of `kind` that the value of `option` means."""
    if is_weights_file(reference):
        return locate(reference)
    location, _, choice = (
        reference.partition("@") if re.search(r"@(best|last|\d+)$", reference) else (reference, "", "")
    )
    store = Store(location)
    if not store.remote and not Path(store.location).exists():
        raise DataError(f"{option} {reference}: nothing there; expected a run, a checkpoint, or a weights file")
    if not store.remote and Path(store.location).is_file():
        return locate(reference)
    if store.exists(STATE):
        CheckpointStore(store, folder="").verify("", FILE_OF_KIND[kind])
        return store, FILE_OF_KIND[kind]
    checkpoints = CheckpointStore(store)
    chosen = checkpoints.choose(choice)
    if chosen is None and not choice and kind == "ema" and _is_published(store):
        return store, PUBLISHED_WEIGHTS
    if chosen is None:
        what = f"no checkpoint {choice!r} in it" if choice and checkpoints.names() else "no finished checkpoint in it"
        have = ", ".join(checkpoints.names()) or "none"
        raise DataError(f"{option} {reference}: {what} (finished: {have}); expected a run that has saved at least once")
    checkpoints.verify(chosen, FILE_OF_KIND[kind])
    return store, f"{checkpoints.folder}/{chosen}/{FILE_OF_KIND[kind]}"


def _is_published(store: Store) -> bool:
    """Return whether a folder is one that `dcgan-export hub` wrote, or a copy on the Hub."""
    return store.exists(PUBLISHED) and is_published(parse_json(store.read(PUBLISHED), store.path(PUBLISHED)))


def network_config(card: dict[str, Any], source: str) -> NetworkConfig:
    """Return the network that the metadata of a weights file name. Raises DataError for one of another version."""
    try:
        config = NetworkConfig.model_validate(card.get("network"))
    except ValidationError as error:
        raise DataError(f"{source}: its network is of another version: {first_problem(error)}") from None
    if config.label and not config.class_images:
        raise DataError(f"{source}: is conditioned on {', '.join(config.label)}, but does not say on which classes")
    return config


def _images_seen(card: dict[str, Any], source: str) -> int | None:
    seen = card.get("images_seen")
    if seen is not None and (type(seen) is not int or not 0 <= seen <= LARGEST):
        raise DataError(f"{source}: says that {seen!r} images were seen in training; expected a number")
    return seen


def _init_from(card: dict[str, Any], source: str) -> list[str]:
    began = card.get(INIT_FROM, [])
    if not isinstance(began, list) or not all(isinstance(one, str) and _SHA256.fullmatch(one) for one in began):
        raise DataError(f"{source}: says that training began from {began!r:.80}; expected SHA-256 of weights files")
    return began


def _filled(build: Callable[[NetworkConfig], N], config: NetworkConfig, tensors: dict[str, "Tensor"], source: str) -> N:
    """Return the network of `config` with `tensors` in it, in eval mode. Raises DataError when they do not fit.

    They are compared first with a network that takes no memory: a small file may name a very large one.
    """
    import torch

    with torch.device("meta"):
        skeleton = build(config)
    try:
        skeleton.load_state_dict({name: tensor.to("meta") for name, tensor in tensors.items()}, assign=True)
        if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
            raise DataError(
                f"{source}: its weights are not finite ({broken[0]}): the training diverged; use an earlier checkpoint"
            )
        network = build(config)
        network.load_state_dict(tensors)
    except RuntimeError as error:  # also what torch cannot do with tensors of an unusual type
        detail = " ".join(str(error).split())[:200]
        raise DataError(f"{source}: the weights do not fit the network they name: {detail}") from None
    return network.eval()
