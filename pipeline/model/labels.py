"""The class of sample i as a pure function of (seed, purpose, i), and classes as the values that networks read."""

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UsageError
from pipeline.common.randomness import Purpose, raw_bits
from pipeline.model.latents import latents

if TYPE_CHECKING:
    from pipeline.config import NetworkConfig

LANE = 1
"""The sequence of each purpose that labels are drawn from; z has 0."""
Draw = Literal["as-trained", "balanced"]
SHOWN = 20
"""Names that an error lists."""


def draw_classes(
    network: "NetworkConfig", seed: int, purpose: Purpose, start: int, count: int, draw: Draw = "as-trained"
) -> NDArray[np.int64]:
    """Return the classes of samples `start` to `start + count`, int64 (count,).

    `as-trained`: drawn with the frequencies of the training set. Sample i owns Philox block i of the purpose's lane 1;
    its class is that of training image floor(u * N) in the order of classes, where u is (k + 1/2) * 2^-53 of the first
    draw's upper 53 bits. `balanced`: i mod the number of classes.
    """
    if draw == "balanced":
        return np.arange(start, start + count, dtype=np.int64) % len(network.classes)
    ends = np.cumsum(network.class_images)
    words = raw_bits(seed, purpose, start, 4 * count, lane=LANE)[::4]
    unit = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    chosen = np.minimum((unit * ends[-1]).astype(np.int64), ends[-1] - 1)
    classes: NDArray[np.int64] = np.searchsorted(ends, chosen, side="right")
    return classes


def label_values(network: "NetworkConfig", classes: NDArray[np.integer]) -> NDArray[np.float32]:
    """Return classes (N,) as the networks read them, float32 (N, label_dim).

    One label: 1 at the place of its class, else 0. Several: 1 for each that is true.
    """
    if len(network.label) > 1:
        rows = np.array([[float(bit) for bit in bits] for bits in network.classes], np.float32)
    else:
        rows = np.eye(len(network.classes), dtype=np.float32)
    values: NDArray[np.float32] = rows[classes]
    return values


def draw_labels(
    network: "NetworkConfig", seed: int, purpose: Purpose, start: int, count: int, draw: Draw = "as-trained"
) -> NDArray[np.float32]:
    """Return the labels of samples `start` to `start + count` as networks read them: float32 (count, label_dim)."""
    return label_values(network, draw_classes(network, seed, purpose, start, count, draw))


def generator_inputs(
    network: "NetworkConfig", seed: int, purpose: Purpose, start: int, count: int
) -> tuple[NDArray[np.float32], ...]:
    """Return what a generator makes samples `start` to `start + count` of: (z,), or (z, label) as trained."""
    z = latents(seed, purpose, start, count, network.latent_dim, network.latent_distribution)
    return (z, draw_labels(network, seed, purpose, start, count)) if network.label else (z,)


def names_in(network: "NetworkConfig", text: str) -> list[str]:
    """Return the names of classes in a comma-separated list; one class may have a comma in its name."""
    whole = text in (*network.class_titles, *network.classes)
    return [text] if whole else [name.strip() for name in text.split(",")]


def named_label(network: "NetworkConfig", name: str, option: str = "label") -> NDArray[np.float32]:
    """Return a class such as `7`, `truck`, `smiling` or `male+eyeglasses` as networks read it, float32 (label_dim,).

    Several labels may be combined in a way that the training set does not have. Raises UsageError that
    begins with `option` and lists the names.
    """
    titles = network.class_titles
    if len(network.label) > 1:
        wanted = [] if name == "none" else [part.strip() for part in name.split("+")]
        if not {*wanted} - {*network.label}:
            return np.array([float(label in wanted) for label in network.label], np.float32)
        known = f"none, or some of {', '.join(network.label)} with + between them"
    else:
        for names in (titles, network.classes):
            if name in names:
                values: NDArray[np.float32] = label_values(network, np.array([names.index(name)]))[0]
                return values
        more = f" and {len(titles) - SHOWN} more" if len(titles) > SHOWN else ""
        known = ", ".join(titles[:SHOWN]) + more
    raise UsageError(f"{option} {name!r}: the model has no such class of {', '.join(network.label)}; it has {known}")
