"""Weights of others' DCGANs: those of pytorch/examples and of whatever is built alike, read without running code.

A network is known by the shapes of its tensors, not by their names, so that it may come from many repositories:
pytorch/examples and PyTorch's tutorial (`main.0.weight`), Natsu6767/DCGAN-PyTorch (`tconv1.weight`, `bn1.weight`),
znxlwm/pytorch-MNIST-CelebA-GAN-DCGAN (`deconv1.weight`, `deconv1_bn.weight`, with biases),
facebookresearch/pytorch_GAN_zoo (`formatLayer.weight`, `main.convTranspose1.weight`), Lightning-Bolts
(`generator.gen.0.0.weight`). Shapes do not tell the nonlinearities: they are taken to be the paper's.
"""

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from pipeline.checkpoints.weights import deserialize
from pipeline.common.errors import DataError, first_line
from pipeline.config import NetworkConfig

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = dict[str, Tensor]

Role = Literal["generator", "discriminator"]

NAMES: dict[Role, tuple[str, ...]] = {
    "generator": ("g_ema", "ema", "netg_ema", "generator_ema", "netg", "generator", "gen", "g"),
    "discriminator": ("netd", "discriminator", "disc", "d"),
}
"""What a file with several networks calls each, in lower case; an average of the weights comes first."""
WHOLE = ("state_dict", "model")
"""What a file with one network beside other things calls it."""
WRAPPERS = ("module", "_orig_mod")
"""Names that DataParallel, DDP and torch.compile put into keys."""
EXPECTED = (
    "expected a {role} as pytorch/examples' DCGAN has it: 4x4 {kind}, BatchNorm after {which}, "
    "sizes doubling and widths halving by two"
)
KINDS: dict[Role, tuple[str, str]] = {
    "generator": ("transposed convolutions", "each but the last"),
    "discriminator": ("convolutions", "each but the first and the last"),
}


def read_others(data: bytes, source: str, role: Role) -> tuple[NetworkConfig, "Tensors"]:
    """Return the configuration and tensors of a network of another project: PyTorch's file, or a safetensors.

    z is taken to be N(0, 1), as in the tutorials. Raises DataError that says what was found instead.
    """
    tensors = _choose(_read(data, source), source, role)
    kind, which = KINDS[role]
    expected = EXPECTED.format(role=role, kind=kind, which=which)
    found = _match(tensors, role)
    if found is None:
        other: Role = "discriminator" if role == "generator" else "generator"
        what = f"holds a {other}" if _match(tensors, other) else f"holds {_summary(tensors)}"
        raise DataError(f"{source}: {what}, {expected}")
    layers, values = found
    try:
        return NetworkConfig.model_validate(values), layers
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise DataError(f"{source}: {where} {problem['input']}: {problem['msg']}; {expected}") from None


def file_format(head: bytes) -> Literal["safetensors", "pytorch"] | None:
    """Return which kind of weights file begins with the bytes `head`, at least 9 of them; None for neither."""
    if head[8:9] == b"{":
        return "safetensors"
    return (
        "pytorch" if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05") else None
    )


def _read(data: bytes, source: str) -> Any:
    if file_format(data[:9]) == "safetensors":
        return deserialize(data, source)[0]
    import torch

    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(
            f"{source}: cannot be read without running code ({first_line(error)}); expected the state_dict of "
            "pytorch/examples' DCGAN, or of one built alike: torch.save(netG.state_dict(), ...)"
        ) from None


def _choose(loaded: Any, source: str, role: Role) -> "Tensors":
    """Return the tensors of the network `role` by their plain names, out of whatever dictionaries they lie in."""
    from torch import Tensor

    for _ in range(3):  # deeper than any file that people have
        if not isinstance(loaded, dict) or not loaded or not all(isinstance(name, str) for name in loaded):
            break
        if all(isinstance(value, Tensor) for value in loaded.values()):
            return _own(loaded, role)
        names = {name.lower().removesuffix("_state_dict"): name for name in loaded}
        inner = next((names[name] for name in (*NAMES[role], *WHOLE) if name in names), None)
        if inner is None or not isinstance(loaded[inner], dict):
            raise DataError(
                f"{source}: holds {_listed(loaded)}; expected the state_dict of pytorch/examples' DCGAN {role}, or one "
                f"under {', '.join(NAMES[role])}, {' or '.join(WHOLE)}"
            )
        loaded = loaded[inner]
    raise DataError(
        f"{source}: holds {type(loaded).__name__}, expected the state_dict of pytorch/examples' DCGAN {role}"
    )


def _own(tensors: "Tensors", role: Role) -> "Tensors":
    """Drop wrappers and counters; where the keys begin with the names of several networks, keep one's."""
    parts = {
        tuple(part for part in name.split(".") if part not in WRAPPERS): value
        for name, value in tensors.items()
        if value.ndim or not name.endswith(("num_batches_tracked", "n_averaged"))
    }
    firsts = {name[0].lower() for name in parts if len(name) > 1}
    if chosen := next((name for name in NAMES[role] if name in firsts), None):
        parts = {name[1:]: value for name, value in parts.items() if name[0].lower() == chosen}
    return {".".join(name): value for name, value in parts.items()}


@dataclass(frozen=True)
class _Convolution:
    weight: "Tensor"
    bias: "Tensor | None"


def _match(tensors: "Tensors", role: Role) -> tuple["Tensors", dict[str, Any]] | None:
    """Return our names for `tensors` and the settings of their network; None unless every one of them has a place."""
    import torch

    weights = [name for name, value in tensors.items() if value.ndim == 4 and name.endswith("weight")]
    norms = [name.removesuffix("running_mean") for name in tensors if name.endswith("running_mean")]
    if len(weights) < 2 or any(tuple(tensors[name].shape[2:]) != (4, 4) for name in weights):
        return None
    for ordered in (list, _natural):  # as the modules were made; in a safetensors the order is lost
        found = _arrange(tensors, ordered(weights), ordered(norms), role)
        if found is not None:
            break
    else:
        return None
    convolutions, statistics = found
    first_norm = 0 if role == "generator" else 1
    outer = convolutions[-1:] if role == "generator" else [convolutions[0], convolutions[-1]]
    has_bias = any(one.bias is not None for one in outer)
    layers: Tensors = {}
    for index, one in enumerate(convolutions):
        norm = index - first_norm
        name = f"layers.{max(3 * index - first_norm, 0)}"
        if role == "discriminator" and index == len(convolutions) - 1:
            name = "head"
        layers[f"{name}.weight"] = one.weight
        if 0 <= norm < len(statistics):
            after = f"layers.{3 * index - first_norm + 1}"
            values = dict(statistics[norm])
            if one.bias is not None:  # BatchNorm takes it away again: its mean is that much higher
                values["running_mean"] = values["running_mean"].float() - one.bias.float()
            layers |= {f"{after}.{key}": value for key, value in values.items()}
            layers[f"{after}.num_batches_tracked"] = torch.tensor(0)
        elif has_bias:
            channels = one.weight.shape[1 if role == "generator" else 0]
            layers[f"{name}.bias"] = torch.zeros(channels) if one.bias is None else one.bias
    ends = convolutions[0].weight.shape, convolutions[-1].weight.shape
    settings = {"image_size": 4 << (len(convolutions) - 1), "latent_distribution": "normal", "bias": has_bias}
    if role == "generator":
        return layers, settings | {"latent_dim": ends[0][0], "width": ends[1][0], "channels": ends[1][1]}
    return layers, settings | {"width": ends[0][0], "channels": ends[0][1]}


def _arrange(
    tensors: "Tensors", weights: list[str], norms: list[str], role: Role
) -> tuple[list[_Convolution], list["Tensors"]] | None:
    """Return convolutions and BatchNorms in this order if each fits the one before and nothing is left over."""
    into, out = (0, 1) if role == "generator" else (1, 0)
    skipped = 1 if role == "generator" else 2
    shapes = [tensors[name].shape for name in weights]
    if any(before[out] != after[into] for before, after in zip(shapes, shapes[1:], strict=False)):
        return None
    if len(norms) != len(weights) - skipped or (role == "discriminator" and shapes[-1][0] != 1):
        return None
    used = {*weights}
    statistics = []
    for norm, shape in zip(norms, shapes[skipped - 1 :], strict=False):
        names = {key: f"{norm}{key}" for key in ("weight", "bias", "running_mean", "running_var")}
        if any(name not in tensors or tensors[name].shape != shape[out : out + 1] for name in names.values()):
            return None
        used |= {*names.values()}
        statistics.append({key: tensors[name] for key, name in names.items()})
    convolutions = []
    for name, shape in zip(weights, shapes, strict=True):
        beside = name.removesuffix("weight") + "bias"
        bias = tensors.get(beside)
        if bias is not None and bias.shape != shape[out : out + 1]:
            return None
        used |= {beside}
        convolutions.append(_Convolution(tensors[name], bias))
    return (convolutions, statistics) if used >= tensors.keys() else None


def _natural(names: Iterable[str]) -> list[str]:
    """Return `names` in the order in which people count: main.2 before main.10."""
    return sorted(
        names,
        key=lambda name: [
            (part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)
        ],
    )


def _summary(tensors: "Tensors") -> str:
    """Name tensors and their shapes, those first that no 4x4 convolution has."""
    large = {name: tuple(value.shape) for name, value in tensors.items() if value.ndim > 1}
    shown = sorted(large, key=lambda name: large[name][2:] == (4, 4))
    return _listed([f"{name} {list(large[name])}" for name in shown] or tensors)


def _listed(names: Iterable[str]) -> str:
    some = list(names)
    return ", ".join(some[:4]) + (", ..." if len(some) > 4 else "")
