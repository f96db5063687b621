"""The checkpoints of a run: what goes into one, what comes out of it, which one a run resumes from."""

import io
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pipeline.checkpoints.initial import InitialWeights, fill, read_initial, recorded, sentences
from pipeline.checkpoints.mirror import HURRIED_SECONDS, PATIENCE_SECONDS, Mirror
from pipeline.checkpoints.saver import HostMemory, Saver
from pipeline.checkpoints.store import HISTORY, PART_BYTES, Checkpoint, CheckpointStore
from pipeline.checkpoints.weights import FILE_OF_KIND, INIT_FROM, Kind, deserialize, serialize_state
from pipeline.common.errors import ConfigConflict, DataError, first_line
from pipeline.common.storage import Store
from pipeline.config import NetworkConfig, RunConfig
from pipeline.model.networks import Discriminator, Generator
from pipeline.training.accelerator import average_batchnorm, from_main
from pipeline.training.collapse.reverts import REVERTS, Revert, recorded_reverts
from pipeline.training.identity import check_identity, describe_process
from pipeline.training.run_directory import CONFIG, RunDirectory, begins_from_weights
from pipeline.training.step import AdversarialStep
from pipeline.training.trackers.outbox import TRACKED, is_tracked

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

OPTIMIZERS = "optimizers.pt"
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Written:
    """A checkpoint that is complete."""

    seconds: float
    """How long it took to write, beside the training."""
    timestamp: float
    """When it was complete (Unix time)."""
    images_seen: int
    """Its position."""


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
        self._written: Written | None = None
        self._newest_path = ""
        self._saver = Saver()
        self._memory = HostMemory()
        self._initial: list[InitialWeights] = []
        self._history: list[str] = []  # the parts of metrics.jsonl so far, and where the last of them ends
        self._history_bytes = 0
        keep = config.schedule.keep_checkpoints
        self._mirror = Mirror(mirror, self.store, keep) if mirror and accelerator.is_main_process else None

    def find(
        self, resume: Literal["auto", "never"], allow_change: Iterable[str], init_from: Sequence[str] = ()
    ) -> Checkpoint | None:
        """Return the newest undamaged checkpoint on every rank, read by the main process alone; None for a new run.

        A new run reads the weights that `init_from` names; one that is there does not. Raises ConfigConflict when the
        run it belongs to differs in more than `allow_change` names or began from noise in spite of `init_from`, or
        when there is one and `resume` is "never".
        """
        start = partial(self._start, resume, allow_change, init_from)
        checkpoint, self._initial = from_main(self.accelerator, start)
        if checkpoint is not None:
            if record := recorded(checkpoint.state, checkpoint.path):
                self.description[INIT_FROM] = record
            elif init_from:
                raise ConfigConflict(
                    f"--init-from {init_from[0]}: the run in {self.out} began from noise; choose another --out, or "
                    "leave the option out to resume it"
                )
            if is_tracked(tracked := checkpoint.state.get(TRACKED)):
                self.description[TRACKED] = tracked
            if reverts := recorded_reverts(checkpoint.state, checkpoint.path):
                self.description[REVERTS] = reverts
            changes = check_identity(checkpoint.state, self.description, allow_change, str(self.out))
            before, now = checkpoint.state.get("threads"), self.process["threads"]
            if self.accelerator.is_main_process:
                for change in changes:
                    log.warning("resuming with a change: %s", change)
                if before is not None and before != now:
                    log.info("%s threads, %s before: results may differ in the last bits", now, before)
        return checkpoint

    def _start(
        self, resume: str, allow_change: Iterable[str], init_from: Sequence[str]
    ) -> tuple[Checkpoint | None, list[InitialWeights]]:
        """Return the checkpoint to resume from, or what a new run begins from, if not from noise."""
        checkpoint = self._newest(resume, allow_change)
        if checkpoint is None and not init_from and begins_from_weights(self.out):
            raise ConfigConflict(
                f"{self.out / CONFIG}: this run was to begin from the weights of another, and has saved nothing yet; "
                "name --init-from again, or choose another --out"
            )
        return checkpoint, read_initial(init_from) if checkpoint is None else []

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
        """Put everything back to where it was at `checkpoint`, or at the start; return the images seen by then.

        Raises ConfigConflict when the weights that a new run begins from do not fit.
        """
        images_seen = 0
        metrics: Iterable[bytes] = ()
        if checkpoint is not None:
            restore(step, checkpoint)
            step.scale_learning_rates(0.5 ** len(self.reverts))
            self._newest_path = checkpoint.path
            images_seen = checkpoint.images_seen
            metrics = chain(self.store.read_parts(checkpoint.history), [checkpoint.file(METRICS)])
        elif self._initial:
            networks: dict[str, Generator | Discriminator] = {"discriminator": step.discriminator}
            networks |= {"generator": step.generator, "average": step.ema.generator}
            self.description[INIT_FROM] = record = fill(networks, self._initial)
            self._initial = []
            for sentence in sentences(record) if run is not None else []:
                log.info("%s", sentence)
        if run is not None:
            self.store.discard_after(images_seen)
            run.restore_metrics(metrics)
            if self._mirror is not None and checkpoint is not None:  # the process before may not have copied it
                self._mirror.push()
        return images_seen

    @property
    def from_noise(self) -> bool:
        """Whether the run began from no other weights."""
        return INIT_FROM not in self.description

    @property
    def reverts(self) -> list[dict[str, Any]]:
        """The record of each time that the run went back to an earlier checkpoint."""
        return list(self.description.get(REVERTS, []))

    def best_before(self, images_seen: int) -> Checkpoint | None:
        """Return on every rank the best checkpoint from before a position; None if none was evaluated and kept."""
        return from_main(self.accelerator, partial(self._best_before, images_seen))

    def _best_before(self, images_seen: int) -> Checkpoint | None:
        self._saver.wait()  # it may be the one that is being written
        if self._mirror is not None:
            self._mirror.restore_best(images_seen)
        return self.store.load_best(images_seen)

    def go_back(self, step: AdversarialStep, checkpoint: Checkpoint, record: Revert) -> None:
        """Take weights, average and moments of `checkpoint`, and halve the learning rates. The position goes on."""
        restore(step, checkpoint)
        step.ema.images_seen.fill_(record.images)
        self.description[REVERTS] = [*self.reverts, record.model_dump()]
        step.scale_learning_rates(0.5 ** len(self.reverts))

    def save(
        self,
        step: AdversarialStep,
        images_seen: int,
        run: RunDirectory | None,
        quality: dict[str, float],
        unfinished: dict[str, Any],
    ) -> None:
        """Copy a checkpoint of this position to host memory, and begin to write it.

        First it waits for the checkpoint before, if that is still being written. When this one is complete, those
        that are no longer kept are deleted, and the mirror gets its copy. The EMA's BatchNorm statistics must have
        been measured here; `unfinished` is the state of a window that does not end here. All ranks must call it.
        """
        for network in (step.generator, step.discriminator):
            average_batchnorm(network, self.accelerator)
        averaged = step.ema.generator
        assert not averaged.training
        if run is not None:
            run.flush_board()
            self._saver.wait()  # also because the copy takes the place of the one before
            kept, lines = self._memory.copy(state_of(step)), run.metrics.stat().st_size
            state = {**self.description, **self.process, "metrics": quality, **unfinished}
            origins = [one["sha256"] for one in self.description.get(INIT_FROM, [])]

            def write() -> None:
                began = time.monotonic()
                files = checkpoint_files(
                    kept, averaged.config, images_seen, self._share_history(run.metrics, lines), origins
                )
                history = {HISTORY: list(self._history)} if self._history else {}
                self.store.save(images_seen, files, {**state, **history})
                self._written = Written(time.monotonic() - began, time.time(), images_seen)
                self.store.retain(self.config.schedule.keep_checkpoints)
                if self._mirror is not None:
                    self._mirror.push()

            self._saver.start(write)
        self._newest_path = self.store.path(f"{images_seen:012d}")

    def _share_history(self, metrics: Path, end: int) -> bytes:
        """Write the parts of metrics.jsonl that are complete by `end`, in bytes; return the lines after them up to it.

        Otherwise every checkpoint would hold all lines: 0.4 GB after ten billion images. The parts follow from the
        lines alone, so a run that resumed, or fell back, makes the parts that it would have made.
        """
        with metrics.open("rb") as file:
            file.seek(self._history_bytes)
            while True:
                lines = b"".join(file.readlines(PART_BYTES))[: end - self._history_bytes]
                if len(lines) <= PART_BYTES:
                    return lines
                self._history.append(self.store.write_part(lines))
                self._history_bytes += len(lines)

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._saver.busy

    def check(self) -> Written | None:
        """Return the last checkpoint that this process has completed. Raises what has kept one from being written."""
        self._saver.check()
        return self._written

    def newest(self) -> str:
        """Wait until the newest checkpoint is complete, and return its path; '' if there is none.

        Raises what has kept it from being written. Ranks that do not write know only that it was begun.
        """
        self._saver.wait()
        return self._newest_path

    @property
    def mirror_state(self) -> tuple[int, float]:
        """Checkpoints that did not reach the mirror, and for how many seconds it has lacked one; (0, 0) without one."""
        return (self._mirror.failures, self._mirror.lag_seconds) if self._mirror is not None else (0, 0.0)

    def close(self, *, hurry: bool = False) -> None:
        """Wait for what is being written, then for the mirror."""
        try:
            self._saver.wait()
        except Exception as error:  # only after another error: a run that ends otherwise has waited already
            log.warning("the last checkpoint was not written: %s", error)
        if self._mirror is not None:
            self._mirror.close(HURRIED_SECONDS if hurry else PATIENCE_SECONDS)


def state_of(step: AdversarialStep) -> dict[str, Any]:
    """Return everything that a checkpoint keeps of `step`: live tensors, which the next update changes."""
    networks: dict[Kind, nn.Module] = {
        "ema": step.ema.generator,
        "raw": step.generator,
        "discriminator": step.discriminator,
    }
    optimizers: dict[str, Any] = {
        "generator": step.optimizer_g.state_dict(),
        "discriminator": step.optimizer_d.state_dict(),
    }
    if step.accelerator.scaler is not None:
        optimizers["scaler"] = step.accelerator.scaler.state_dict()
    return {"networks": {kind: network.state_dict() for kind, network in networks.items()}, "optimizers": optimizers}


def checkpoint_files(
    state: dict[str, Any], config: NetworkConfig, images_seen: int, metrics: bytes, init_from: Sequence[str] = ()
) -> dict[str, bytes]:
    """Return the files of a checkpoint of what `state_of` returned. The EMA's BatchNorm statistics must be measured.

    `init_from` are the SHA-256 of the weights files that the run began from.
    """
    files = {
        FILE_OF_KIND[kind]: serialize_state(tensors, config, kind, images_seen, init_from)
        for kind, tensors in state["networks"].items()
    }
    buffer = io.BytesIO()
    torch.save(state["optimizers"], buffer)
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
