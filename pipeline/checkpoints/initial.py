"""`--init-from`: the weights of other networks, and which of them fit the networks of a new run."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.checkpoints.examples import Role, read_others
from pipeline.checkpoints.reference import is_weights_file, network_config, public_reference, read_own, read_weights
from pipeline.checkpoints.weights import INIT_FROM, Kind, deserialize
from pipeline.common.errors import ConfigConflict, DataError, UsageError
from pipeline.common.storage import sha256_bytes
from pipeline.config import NetworkConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.model.networks import Discriminator, Generator

NETWORKS = {"ema": "average", "raw": "generator", "netG": "generator", "discriminator": "discriminator"}
"""Kind of weights: the network of a run that begins from them."""


@dataclass(frozen=True)
class InitialWeights:
    """The weights of one network that a run begins from."""

    network: str
    """`generator`, `discriminator`, or `average`, the generator's moving average."""
    tensors: dict[str, "Tensor"]
    config: NetworkConfig
    reference: str
    """The file, as files that travel name it."""
    sha256: str
    images_seen: int | None


def read_initial(references: Iterable[str]) -> list[InitialWeights]:
    """Return the weights that `--init-from` names: of runs and checkpoints, or of single networks.

    A run or checkpoint has a generator, its average and a discriminator; a weights file has one network, or a netG and
    a netD where another project's holds both. Raises DataError for what cannot be read or is not finite, UsageError
    when a network is named twice.
    """
    found: dict[str, InitialWeights] = {}
    for reference in references:
        for one in _of_file(reference) if is_weights_file(reference) else _of_run(reference):
            if one.network in found:
                raise UsageError(f"--init-from {reference}: names a second {one.network}; name each network once")
            found[one.network] = one
    return list(found.values())


def _of_run(reference: str) -> Iterator[InitialWeights]:
    kinds: tuple[Kind, ...] = ("raw", "ema", "discriminator")
    for kind in kinds:
        source, data = read_weights(reference, kind, option="--init-from")
        yield _own(source, data, *deserialize(data, source))


def _of_file(reference: str) -> Iterator[InitialWeights]:
    source, data = read_weights(reference, "raw", option="--init-from")
    if ours := read_own(data, source):
        one = _own(source, data, *ours)
        yield replace(one, network="generator") if one.network == "average" else one  # the only generator there
        return
    problems = []
    roles: tuple[Role, ...] = ("generator", "discriminator")
    for role in roles:
        try:
            config, tensors = read_others(data, source, role)
        except DataError as error:
            problems.append(error)
        else:
            yield _checked(source, data, role, tensors, config, None)
    if len(problems) == len(roles):
        raise problems[0]


def _own(source: str, data: bytes, tensors: dict[str, "Tensor"], card: dict[str, Any]) -> InitialWeights:
    if card.get("kind") not in NETWORKS:
        raise DataError(f"{source}: holds weights of another project; expected those of a run")
    seen = card.get("images_seen")
    config = network_config(card, source)
    return _checked(source, data, NETWORKS[card["kind"]], tensors, config, seen if type(seen) is int else None)


def _checked(
    source: str, data: bytes, network: str, tensors: dict[str, "Tensor"], config: NetworkConfig, seen: int | None
) -> InitialWeights:
    import torch

    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise DataError(f"{source}: its weights are not finite ({broken[0]}); use an earlier checkpoint")
    return InitialWeights(network, tensors, config, public_reference(source), sha256_bytes(data), seen)


def fill(
    networks: Mapping[str, "Generator | Discriminator"], weights: Iterable[InitialWeights]
) -> list[dict[str, Any]]:
    """Put `weights` into the `networks`, by name, and return what was taken from where, for the run's record.

    An average without weights of its own gets the generator's. Raises ConfigConflict when a network gets no layer.
    """
    record = []
    sources = {one.network: one for one in weights}
    if "generator" in sources:
        sources.setdefault("average", sources["generator"])
    for name, source in sources.items():
        network, theirs, ours = networks[name], source.config, networks[name].config
        taken = fitting(network, source.tensors) if theirs.architecture == ours.architecture else {}
        if not taken:
            raise ConfigConflict(
                f"--init-from {source.reference}: none of its layers fits this run's {name}: "
                + "; ".join(
                    f"network.{key} is {have} there, {want} here" for key, have, want in _differences(theirs, ours)
                )
            )
        network.load_state_dict(taken, strict=False)
        layers, new = describe(network, taken)
        if source.network == name:
            found = {"reference": source.reference, "sha256": source.sha256, "images_seen": source.images_seen}
            record.append({"network": name, **found, "layers": layers, "new": new})
    return record


def sentences(record: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line for each network: what a run takes over, and what is new."""
    lines = []
    for one in record:
        new = f"; new: {', '.join(one['new'])}" if one["new"] else ""
        lines.append(f"{one['network']}: {one['layers']} of {one['layers'] + len(one['new'])} layers from "
                     f"{one['reference']}{new}")  # fmt: skip
    missing = {"generator", "discriminator"} - {one["network"] for one in record}
    return lines + [f"{name}: new, nothing was named for it" for name in sorted(missing)]


def recorded(state: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return what a state.json says that the run began from; [] for noise. Raises DataError when it is damaged."""
    record = state.get(INIT_FROM, [])
    if not isinstance(record, list) or not all(isinstance(one, dict) and _is_hash(one.get("sha256")) for one in record):
        raise DataError(f"{where}: its entry `{INIT_FROM}` is damaged; restore it, or remove it")
    return record


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))


def _differences(theirs: NetworkConfig, ours: NetworkConfig) -> list[tuple[str, Any, Any]]:
    layers = ("kernel_size", "upsampling", "head", "bias", "first_batchnorm", "discriminator_norm")
    names = ("architecture", "image_size", "channels", "width", *layers, "label")
    return [(n, getattr(theirs, n), getattr(ours, n)) for n in names if getattr(theirs, n) != getattr(ours, n)]


def fitting(network: "nn.Module", source: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Return the tensors of `source` for those layers of `network` that it has in the same shape, by their names here.

    A layer is taken whole or not at all. Where one network has more stages than the other, its layers are counted
    from that end of the network from which more weights fit.
    """
    layers = _by_layer(network.state_dict())
    have = _by_layer(source)
    best: dict[str, Tensor] = {}
    for shifts in _alignments(layers, have):
        taken: dict[str, Tensor] = {}
        for layer, wanted in layers.items():
            found = have.get(_shifted(layer, shifts), {})
            if {name: one.shape for name, one in found.items()} == {name: one.shape for name, one in wanted.items()}:
                taken |= {f"{layer}.{name}" if layer else name: tensor for name, tensor in found.items()}
        if not best or _count(taken) > _count(best):
            best = taken
    return best


def describe(network: "nn.Module", taken: Mapping[str, "Tensor"]) -> tuple[int, list[str]]:
    """Return how many layers of `network` were taken, and the names of those that are new."""
    layers, had = list(_by_layer(network.state_dict())), _by_layer(taken)
    return len(had), [layer for layer in layers if layer not in had]


def _by_layer(tensors: Mapping[str, "Tensor"]) -> dict[str, dict[str, "Tensor"]]:
    """Return the tensors of each layer by their names in it."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.rpartition(".")
        layers.setdefault(layer, {})[rest] = tensor
    return layers


def _alignments(layers: Iterable[str], have: Iterable[str]) -> list[dict[str, int]]:
    """Return by how much to shift the numbers in each list of layers: nothing, or so that the last ones meet."""
    ends = [_last(names) for names in (layers, have)]
    moved = {group: ends[1][group] - ends[0][group] for group in ends[0] if group in ends[1]}
    return [{}, moved] if any(moved.values()) else [{}]


def _last(layers: Iterable[str]) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for layer in layers:
        group, _, rest = layer.partition(".")
        if (number := rest.partition(".")[0]).isdigit():
            numbers[group] = max(int(number), numbers.get(group, 0))
    return numbers


def _shifted(layer: str, shifts: Mapping[str, int]) -> str:
    group, _, rest = layer.partition(".")
    number, dot, inner = rest.partition(".")
    if not shifts.get(group) or not number.isdigit():
        return layer
    return f"{group}.{int(number) + shifts[group]}{dot}{inner}"


def _count(tensors: Mapping[str, "Tensor"]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
