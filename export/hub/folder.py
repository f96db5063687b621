"""dcgan-export hub: everything that a model's repository on the Hub holds, in one folder."""

import json
import math
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from export.builders.onnx_model import export_onnx
from export.format.card import Card
from export.hub.model_card import LIBRARY, METRIC_NAMES, Training, model_card
from pipeline.checkpoints.reference import LoadedGenerator, load_generator, read_own, read_weights
from pipeline.checkpoints.store import STATE
from pipeline.checkpoints.weights import PUBLISHED, PUBLISHED_WEIGHTS, is_published, serialize_state
from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import encode, grid, labeled_sheet
from pipeline.common.randomness import Purpose
from pipeline.common.records import parse_json
from pipeline.common.storage import Store, locate, require_writable, sha256_bytes
from pipeline.model.sampling import class_grid, sample

SAMPLES = 64
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_DATASET = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def write_hub_folder(
    reference: str,
    out: Path,
    *,
    title: str | None = None,
    license: str | None = None,
    datasets: list[str] | None = None,
    parity_images: int,
) -> Card:
    """Write README.md, config.json, the weights, the ONNX file, its card and samples into `out`; config.json last.

    Nothing in them names this machine, its user or a folder of it. Raises UsageError when `out` holds something else,
    and for names that the Hub does not take; else what `load_generator` and `export_onnx` raise.
    """
    if license is not None and not _LICENSE.fullmatch(license):
        raise UsageError(f"--license {license}: expected the Hub's name of one, such as apache-2.0, cc0-1.0 or other")
    for dataset in datasets or []:
        if not _DATASET.fullmatch(dataset):
            raise UsageError(f"--dataset {dataset}: expected the name of a data set on the Hub, such as owner/name")
    store = Store(out)
    if store.names() and not (store.exists(PUBLISHED) and is_published(_json(store, PUBLISHED))):
        raise UsageError(f"--out {out}: holds something else; expected a new folder, or one that this command wrote")
    require_writable(out)
    loaded = load_generator(reference)
    source, data = read_weights(reference, "ema")
    weights = data if read_own(data, source) is not None else _ours(loaded)
    with TemporaryDirectory() as folder:  # so that the card names the file that is published
        copy = Path(folder) / PUBLISHED_WEIGHTS
        copy.write_bytes(weights)
        card = export_onnx(str(copy), out, parity_images=parity_images)
    height, width, _ = loaded.config.image_shape
    text = model_card(
        loaded.config,
        title=title or f"DCGAN {width}x{height}",
        license=license,
        datasets=datasets or [],
        images_seen=loaded.images_seen,
        sha256=sha256_bytes(weights),
        training=_training(source),
    )
    config = {
        "library_name": LIBRARY,
        "version": 1,
        "weights": PUBLISHED_WEIGHTS,
        "sha256": sha256_bytes(weights),
        "network": loaded.config.model_dump(),
    }
    store.write_all(
        {
            PUBLISHED_WEIGHTS: weights,
            "samples.png": _samples(loaded),
            "README.md": text.encode(),
            PUBLISHED: (json.dumps(config, indent=2) + "\n").encode(),
        }
    )
    return card


def _ours(loaded: LoadedGenerator) -> bytes:
    """Return the weights of another project as a file of this one."""
    tensors = loaded.generator.state_dict()
    return serialize_state(tensors, loaded.config, "raw", loaded.images_seen, loaded.init_from)


def _samples(loaded: LoadedGenerator) -> bytes:
    """Return a PNG of the first samples of seed 0; of a conditional network a row for each class."""
    if loaded.config.label:
        return encode(labeled_sheet(class_grid(loaded.generator, 0)), "png")
    return encode(grid(sample(loaded.generator, 0, Purpose.SAMPLE, 0, SAMPLES), 8), "png")


def _training(source: str) -> Training | None:
    """Return what the checkpoint of a weights file says of its training; None where it lies in none."""
    store, name = locate(source)
    if name.count("/") or not store.exists(STATE):
        return None
    state = _json(store, STATE)
    try:
        metrics = {name: float(state["metrics"][name]) for name in METRIC_NAMES if name in state.get("metrics", {})}
        return Training(
            data=str(state["dataset"]["location"]),
            images=int(state["dataset"]["images"]),
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
            samples=min(int(state["config"]["schedule"]["evaluate_samples"]), int(state["dataset"]["images"])),
        )
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{store.path(STATE)}: damaged; name the weights file itself to do without it") from None


def _json(store: Store, name: str) -> Any:
    return parse_json(store.read(name), store.path(name))
