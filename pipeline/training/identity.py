"""What a run is, in its config.json and state.json, and whether it may continue from a checkpoint."""

import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from pipeline.common.errors import ConfigConflict, DataError, UsageError, first_line
from pipeline.common.storage import public_name
from pipeline.config import RunConfig
from pipeline.data.dataset import Dataset

if TYPE_CHECKING:
    from accelerate import Accelerator


def describe_run(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """Return what config.json and state.json say about a run: nothing of this machine, for both are published.

    `RunDirectory` keeps the data set's location, for resuming here.
    """
    source = dict(dataset.source)
    if isinstance(location := source.get("location"), str):
        source["location"] = public_name(location)
    return {
        "config": config.model_dump(),
        "dataset": {
            "location": public_name(dataset.location),
            "fingerprint": dataset.fingerprint(),
            "images": dataset.images,
            "encoding": dataset.encoding,
            "source": source,
        },
    }


def describe_process(accelerator: "Accelerator") -> dict[str, Any]:
    """Return what bit-equality depends on beyond the configuration: versions, threads, processes, precision."""
    packages = ("torch", "accelerate", "numpy", "safetensors")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", ""),
        "world_size": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "device": accelerator.device.type,
    }


def check_identity(saved: dict[str, Any], current: dict[str, Any], allowed: Iterable[str], where: str) -> list[str]:
    """Refuse to continue a run whose identity changed (docs/architecture.md, contract 4).

    `saved` and `current` are `describe_run` results. Returns the changes that were allowed, in words. Raises
    ConfigConflict with the difference, UsageError for an allowed name that is no part of the identity.
    """

    def identity(run: dict[str, Any]) -> dict[str, Any]:
        settings = RunConfig.model_validate(run["config"]).identity()
        return {**settings, "data": f"fingerprint {run['dataset']['fingerprint'][:12]}"}

    try:
        before, now = identity(saved), identity(current)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: its configuration is of another version: {first_line(error)}") from None
    allowed = set(allowed)
    if unknown := sorted(allowed - before.keys()):
        raise UsageError(f"--allow-change {','.join(unknown)}: not part of a run's identity: {', '.join(before)}")
    changes = {key: f"{key} {before[key]} -> {now[key]}" for key in before if before[key] != now[key]}
    if refused := sorted(changes.keys() - allowed):
        raise ConfigConflict(
            f"{where} was trained with other settings: {'; '.join(changes[key] for key in refused)}. "
            f"Restore them, choose another --out, or accept with --allow-change {','.join(refused)}"
        )
    return [changes[key] for key in sorted(changes)]
