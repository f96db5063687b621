"""A sampler's rows: z, and behind it the label of a conditional model, as one float32 array (N, row_dim).

The label takes one column, the number of its class, or one for each of several labels that are true or false.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UsageError
from pipeline.common.randomness import Purpose
from pipeline.config import NetworkConfig
from pipeline.model.labels import draw_classes, label_values, named_label
from pipeline.model.latents import latents

Rows = NDArray[np.float32]
Labels = str | Sequence[str] | Sequence[int] | NDArray[np.integer] | NDArray[np.bool_] | Rows
"""Labels of N images, as clients name them: one name for all, or a name, a class's number, or the values of each."""


def label_width(network: NetworkConfig) -> int:
    """Return the columns of a label: 0 without one."""
    return 0 if not network.label else len(network.label) if len(network.label) > 1 else 1


def of_classes(network: NetworkConfig, classes: NDArray[np.integer]) -> Rows:
    """Return the columns of classes (N,), by their numbers: (N, label_width)."""
    if len(network.label) > 1:
        return label_values(network, classes)
    return np.asarray(classes, np.float32)[:, None]


def rows_at(network: NetworkConfig, seed: int, purpose: Purpose, start: int, count: int) -> Rows:
    """Return the rows of samples `start` to `start + count`, a pure function of its arguments; labels as trained."""
    z = latents(seed, purpose, start, count, network.latent_dim, network.latent_distribution)
    if not network.label:
        return z
    return np.concatenate([z, of_classes(network, draw_classes(network, seed, purpose, start, count))], 1)


def with_labels(network: NetworkConfig, z: Rows, labels: Labels | None) -> Rows:
    """Return the rows of z (N, latent_dim) and N labels. Raises UsageError for labels that the model does not have."""
    if labels is None:
        if network.label and z.ndim == 2 and z.shape[1] == network.latent_dim:
            raise UsageError(
                f"the model is conditioned on {', '.join(network.label)}: pass labels=, one for each row of z"
            )
        return z
    if not network.label:
        raise UsageError("labels: the model is not conditioned on a label; leave them out")
    return np.concatenate([z, _columns(network, labels, len(z))], 1, dtype=np.float32)


def _columns(network: NetworkConfig, labels: Labels, count: int) -> Rows:
    if isinstance(labels, str):
        return np.tile(named(network, labels), (count, 1))
    if len(labels) and isinstance(labels[0], str):
        values = np.concatenate([named(network, str(label)) for label in labels])
    else:
        values = np.asarray(labels, np.float32)
        if values.ndim == 1:
            if any(number not in range(len(network.classes)) for number in values.tolist()):
                raise UsageError(f"labels: expected the numbers of classes, 0 to {len(network.classes) - 1}")
            values = of_classes(network, values.astype(np.int64))
    if values.shape != (count, label_width(network)):
        expected = f"({count}, {len(network.label)})" if len(network.label) > 1 else f"({count},)"
        raise UsageError(f"labels of shape {np.shape(labels)}: expected {expected}, one for each row of z")
    return values


def named(network: NetworkConfig, name: str, option: str = "label") -> Rows:
    """Return the columns (1, label_width) of a class, by its name. Raises UsageError that begins with `option`."""
    values = named_label(network, name, option)[None]
    return values if len(network.label) > 1 else of_classes(network, values.argmax(1))


def feeds(network: NetworkConfig, rows: Rows) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
    """Return the inputs of an exported graph, by name: z, and label (int64 (N,), or float32 (N, labels))."""
    if not network.label:
        return {"z": rows}
    z, label = np.split(rows, [network.latent_dim], axis=1)
    columns = np.ascontiguousarray(label) if len(network.label) > 1 else label[:, 0].astype(np.int64)
    return {"z": np.ascontiguousarray(z), "label": columns}
