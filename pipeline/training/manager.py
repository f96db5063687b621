"""The checkpoints of a run: what goes into one, what comes out of it, which one a run resumes from."""

import io
import logging
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from pipeline.checkpoints.mirror import HURRIED_SECONDS, PATIENCE_SECONDS, Mirror
from pipeline.checkpoints.store import HISTORY, PART_BYTES, Checkpoint, CheckpointStore
from pipeline.checkpoints.weights import FILE_OF_KIND, Kind, deserialize, serialize
from pipeline.common.errors import ConfigConflict, DataError, first_line
from pipeline.common.storage import Store
from pipeline.config import RunConfig
from pipeline.training.accelerator import average_batchnorm, together
from pipeline.training.identity import check_identity, describe_process
from pipeline.training.run_directory import RunDirectory
from pipeline.training.step import AdversarialStep

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

OPTIMIZERS = "optimizers.pt"
METRICS = "metrics.jsonl"


class CheckpointManager:
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
        self._history: list[str] = []  # the parts of metrics.jsonl so far, and where the last of them ends
        self._history_bytes = 0
        keep = config.schedule.keep_checkpoints
        self._mirror = Mirror(mirror, self.store, keep) if mirror and accelerator.is_main_process else None

    def find(self, resume: Literal["auto", "never"], allow_change: Iterable[str]) -> Checkpoint | None:
        """Return the newest undamaged checkpoint on every rank, read by the main process alone; None for a new run.

        Raises ConfigConflict when the run it belongs to differs in more than `allow_change` names, or when there is
        one and `resume` is "never".
        """
        main = self.accelerator.is_main_process
        found = [together(self.accelerator, lambda: self._newest(resume, allow_change) if main else None)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        (checkpoint,) = found
        if checkpoint is not None:
            changes = check_identity(checkpoint.state, self.description, allow_change, str(self.out))
            before, now = checkpoint.state.get("threads"), self.process["threads"]
            if main:
                for change in changes:
                    log.warning("resuming with a change: %s", change)
                if before is not None and before != now:
                    log.info("%s threads, %s before: results may differ in the last bits", now, before)
        return checkpoint

    def _newest(self, resume: str, allow_change: Iterable[str]) -> Checkpoint | None:
        """Return the newest undamaged checkpoint of the run, brought back from the mirror if that one is newer."""
        if resume == "never":
            stores = {"--out": self.store} | ({"--mirror": self._mirror.checkpoints} if self._mirror else {})
            for option, store in stores.items():
                if names := store.names():
                    raise ConfigConflict(
                        f"--resume never: {store.path(names[-1])} is already there; choose another {option}"
                    )
            return None
        if self._mirror is not None:
            where = self._mirror.store.location
            self._mirror.restore(lambda there: check_identity(there.state, self.description, allow_change, where))
        return self.store.load_latest()

    def restore(self, step: AdversarialStep, checkpoint: Checkpoint | None, run: RunDirectory | None) -> int:
        """Put everything back to where it was at `checkpoint`, or at the start; return the images seen by then."""
        images_seen = 0
        metrics: Iterable[bytes] = ()
        if checkpoint is not None:
            restore(step, checkpoint)
            self.last_path = checkpoint.path
            images_seen = checkpoint.images_seen
            metrics = chain(self.store.read_parts(checkpoint.history), [checkpoint.file(METRICS)])
        if run is not None:
            self.store.discard_after(images_seen)
            run.restore_metrics(metrics)
            if self._mirror is not None and checkpoint is not None:  # the process before may not have copied it
                self._mirror.push()
        return images_seen

    def save(
        self,
        step: AdversarialStep,
        images_seen: int,
        run: RunDirectory | None,
        quality: dict[str, float],
        unfinished: dict[str, Any],
    ) -> None:
        """Write a checkpoint at this position, then delete those that are no longer kept.

        `unfinished` is the state of a window that does not end here.
        """
        for network in (step.generator, step.discriminator):
            average_batchnorm(network, self.accelerator)
        averaged = step.ema.estimate_batchnorm(self.config.recipe.seed)
        assert not averaged.training
        if run is not None:
            files = checkpoint_files(step, images_seen, self._share_history(run.metrics))
            history = {HISTORY: self._history} if self._history else {}
            state = {**self.description, **self.process, "metrics": quality, **history, **unfinished}
            self.store.save(images_seen, files, state)
            self.store.retain(self.config.schedule.keep_checkpoints)
            if self._mirror is not None:
                self._mirror.push()
        self.last_path = self.store.path(f"{images_seen:012d}")

    def _share_history(self, metrics: Path) -> bytes:
        """Write the parts of metrics.jsonl that are complete; return the lines after them.

        Otherwise every checkpoint would hold all lines: 0.4 GB after ten billion images. The parts follow from the
        lines alone, so a run that resumed, or fell back, makes the parts that it would have made.
        """
        with metrics.open("rb") as file:
            file.seek(self._history_bytes)
            while len(lines := b"".join(file.readlines(PART_BYTES))) > PART_BYTES:
                self._history.append(self.store.write_part(lines))
                self._history_bytes += len(lines)
        return lines

    @property
    def mirror_failures(self) -> int:
        """Checkpoints that did not reach the mirror."""
        return self._mirror.failures if self._mirror is not None else 0

    def close(self, *, hurry: bool = False) -> None:
        """Wait for the mirror."""
        if self._mirror is not None:
            self._mirror.close(HURRIED_SECONDS if hurry else PATIENCE_SECONDS)


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
        "generator": step.optimizer_g.state_dict(),
        "discriminator": step.optimizer_d.state_dict(),
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
        tensors, _ = deserialize(checkpoint.file(FILE_OF_KIND[kind]), where)
        try:
            network.load_state_dict(tensors)
        except RuntimeError as error:
            raise DataError(f"{where}: does not fit the network: {' '.join(str(error).split())[:160]}") from None
    where = f"{checkpoint.path}/{OPTIMIZERS}"
    try:
        states = torch.load(io.BytesIO(checkpoint.file(OPTIMIZERS)), map_location="cpu", weights_only=True)
        step.optimizer_g.load_state_dict(_fit(states["generator"], step.optimizer_g))
        step.optimizer_d.load_state_dict(_fit(states["discriminator"], step.optimizer_d))
        if step.accelerator.scaler is not None and "scaler" in states:
            step.accelerator.scaler.load_state_dict(states["scaler"])
    except Exception as error:
        raise DataError(f"{where}: cannot be restored: {first_line(error)}") from None
    step.ema.images_seen.fill_(checkpoint.images_seen)


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
