"""What goes into a checkpoint and comes out of it, and whether a run may continue from it."""

import io
import logging
import os
import platform
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.checkpoints.mirror import HURRIED_SECONDS, PATIENCE_SECONDS, Mirror
from pipeline.checkpoints.store import Checkpoint, CheckpointStore
from pipeline.checkpoints.weights import FILE_OF_KIND, Kind, deserialize, serialize
from pipeline.common.errors import ConfigConflict, DataError, UsageError
from pipeline.common.storage import Store
from pipeline.config import RunConfig
from pipeline.data.dataset import Dataset
from pipeline.training.run_directory import RunDirectory
from pipeline.training.step import AdversarialStep

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

OPTIMIZERS = "optimizers.pt"
METRICS = "metrics.jsonl"


class Saver:
    """The checkpoints of one run, as its loop uses them. Only the main process touches the disk."""

    def __init__(
        self, config: RunConfig, description: dict[str, Any], accelerator: "Accelerator", out: Path, mirror: str | None
    ) -> None:
        self.config = config
        self.description = description
        self.accelerator = accelerator
        self.out = out
        self.store = CheckpointStore(Store(out))
        self.process = describe_process(accelerator)
        self.last_path = ""
        """The newest checkpoint known to be good."""
        self._saved_at = time.monotonic()
        keep = config.schedule.keep_checkpoints
        self._mirror = Mirror(mirror, self.store, keep) if mirror and accelerator.is_main_process else None

    def due(self) -> bool:
        """Whether `schedule.checkpoint_minutes` have passed since the last checkpoint."""
        return time.monotonic() - self._saved_at >= 60 * self.config.schedule.checkpoint_minutes > 0

    def find(self, allow_change: Iterable[str]) -> Checkpoint | None:
        """Return the newest undamaged checkpoint on every rank, read by the main process alone; None for a new run.

        Raises ConfigConflict when the run it belongs to differs in more than `allow_change` names.
        """
        found: list[Checkpoint | None] = [None]
        if self.accelerator.is_main_process:
            if self._mirror is not None:
                where = self._mirror.store.location
                self._mirror.restore(lambda there: check_identity(there.state, self.description, allow_change, where))
            found = [self.store.load_latest()]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(found)
        checkpoint = found[0]
        if checkpoint is not None:
            changes = check_identity(checkpoint.state, self.description, allow_change, str(self.out))
            before, now = checkpoint.state["threads"], self.process["threads"]
            if self.accelerator.is_main_process:
                for change in changes:
                    log.warning("continuing with a change: %s", change)
                if before != now:
                    log.info("%d threads, %d before: results may differ in the last bits", now, before)
        return checkpoint

    def restore(self, step: AdversarialStep, checkpoint: Checkpoint, run: RunDirectory | None) -> int:
        """Put everything back to where it was at `checkpoint`; return the images seen by then."""
        restore(step, checkpoint)
        self.last_path = checkpoint.path
        if run is not None:
            self.store.discard_after(checkpoint.images_seen)
            run.restore_metrics(checkpoint.files[METRICS])
        return checkpoint.images_seen

    def save(
        self, step: AdversarialStep, images_seen: int, run: RunDirectory | None, quality: dict[str, float]
    ) -> None:
        """Write a checkpoint at this position, then let go of those no longer kept."""
        for network in (step.generator, step.discriminator):
            average_batchnorm(network, self.accelerator)
        averaged = step.ema.estimate_batchnorm(self.config.recipe.seed)
        assert not averaged.training
        if run is not None:
            files = checkpoint_files(step, images_seen, run.metrics.read_bytes())
            self.store.save(images_seen, files, {**self.description, **self.process, "metrics": quality})
            self.store.retain(self.config.schedule.keep_checkpoints)
            if self._mirror is not None:
                self._mirror.push()
        self.last_path = self.store.path(f"{images_seen:012d}")
        self._saved_at = time.monotonic()

    @property
    def mirror_failures(self) -> int:
        """Checkpoints that did not reach the mirror."""
        return self._mirror.failures if self._mirror is not None else 0

    def close(self, *, hurry: bool = False) -> None:
        """Wait for the mirror."""
        if self._mirror is not None:
            self._mirror.close(HURRIED_SECONDS if hurry else PATIENCE_SECONDS)


def describe_run(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """Return what config.json and state.json say about a run."""
    return {
        "config": config.model_dump(),
        "dataset": {
            "location": dataset.location if dataset.store.remote else str(Path(dataset.location).resolve()),
            "fingerprint": dataset.fingerprint(),
            "images": dataset.images,
            "encoding": dataset.encoding,
            "source": dataset.source,
        },
    }


def describe_process(accelerator: "Accelerator") -> dict[str, Any]:
    """Return what bit-equality depends on beyond the configuration: versions, threads, processes, precision."""
    packages = ("torch", "accelerate", "numpy", "safetensors")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "threads": torch.get_num_threads(),
        "world_size": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "device": accelerator.device.type,
        "interop": os.environ.get("OMP_NUM_THREADS", ""),
    }


def check_identity(saved: dict[str, Any], current: dict[str, Any], allowed: Iterable[str], where: str) -> list[str]:
    """Refuse to continue a run whose identity changed (DESIGN contract 4).

    `saved` and `current` are `describe_run` results. Returns the changes that were allowed, in words. Raises
    ConfigConflict with the difference, UsageError for an allowed name that is no part of the identity.
    """

    def identity(run: dict[str, Any]) -> dict[str, Any]:
        settings = RunConfig.model_validate(run["config"]).identity()
        return {**settings, "data": f"fingerprint {run['dataset']['fingerprint'][:12]}"}

    try:
        before, now = identity(saved), identity(current)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: its configuration is of another version: {str(error).splitlines()[0]}") from None
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


def average_batchnorm(network: nn.Module, accelerator: "Accelerator") -> None:
    """Make the running BatchNorm statistics equal on all ranks: their mean."""
    if accelerator.num_processes == 1:
        return
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    torch.distributed.all_reduce(flat)
    flat /= accelerator.num_processes
    means = torch.split(flat, [buffer.numel() for buffer in buffers])
    for buffer, mean in zip(buffers, means, strict=True):
        buffer.copy_(mean.view_as(buffer))


def checkpoint_files(step: AdversarialStep, images_seen: int, metrics: bytes) -> dict[str, bytes]:
    """Return the files of a checkpoint. The EMA's BatchNorm statistics must have been measured."""
    networks: dict[Kind, nn.Module] = {
        "ema": step.ema.generator,
        "raw": step.generator,
        "discriminator": step.discriminator,
    }
    config = step.ema.generator.config
    files = {FILE_OF_KIND[kind]: serialize(net, config, kind, images_seen) for kind, net in networks.items()}
    states: dict[str, Any] = {
        "generator": step.optimizer_g.optimizer.state_dict(),
        "discriminator": step.optimizer_d.optimizer.state_dict(),
    }
    if step.accelerator.scaler is not None:
        states["scaler"] = step.accelerator.scaler.state_dict()
    buffer = io.BytesIO()
    torch.save(states, buffer)
    return {**files, OPTIMIZERS: buffer.getvalue(), METRICS: metrics}


def restore(step: AdversarialStep, checkpoint: Checkpoint) -> None:
    """Put networks, average and optimizers back to where they were. Raises DataError when they do not fit."""
    networks: dict[Kind, nn.Module] = {
        "ema": step.ema.generator,
        "raw": step.generator,
        "discriminator": step.discriminator,
    }
    for kind, network in networks.items():
        where = f"{checkpoint.path}/{FILE_OF_KIND[kind]}"
        tensors, _ = deserialize(checkpoint.files[FILE_OF_KIND[kind]], where)
        try:
            network.load_state_dict(tensors)
        except RuntimeError as error:
            raise DataError(f"{where}: does not fit the network: {' '.join(str(error).split())[:160]}") from None
    where = f"{checkpoint.path}/{OPTIMIZERS}"
    try:
        states = torch.load(io.BytesIO(checkpoint.files[OPTIMIZERS]), map_location="cpu", weights_only=True)
        step.optimizer_g.optimizer.load_state_dict(_fit(states["generator"], step.optimizer_g.optimizer))
        step.optimizer_d.optimizer.load_state_dict(_fit(states["discriminator"], step.optimizer_d.optimizer))
        if step.accelerator.scaler is not None and "scaler" in states:
            step.accelerator.scaler.load_state_dict(states["scaler"])
    except Exception as error:
        raise DataError(f"{where}: cannot be restored: {str(error).strip().splitlines()[0]}") from None


def _fit(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Take the moments from `state` but learning rates and kernels from `optimizer`: those follow the configuration.

    The moments take the memory order of their weights, which may be another one now (runtime.channels_last): the
    fused kernel reads both as flat memory and would pair each weight with the moments of another.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def ordered(weight: Tensor, value: Tensor) -> Tensor:
        return torch.empty_like(weight, device="cpu").copy_(value) if value.ndim else value

    moments = {
        index: {name: ordered(weights[index].detach(), value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
