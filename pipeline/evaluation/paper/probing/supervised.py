"""The probe's control: a supervised CNN of D's architecture, trained from scratch on the same labels (section 5.2)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from pipeline.common.imaging import Pixels
from pipeline.common.progress import Progress
from pipeline.common.randomness import Purpose, permutation, raw_bits
from pipeline.common.storage import sha256_bytes, write_atomic
from pipeline.config import NetworkConfig
from pipeline.evaluation.device import device, to_network
from pipeline.model.networks import build_discriminator, initialize

BATCH = 64
STEPS = 600
"""Updates of a trial."""
EVERY = 50
"""Updates between two looks at the validation images; the weights at the best of them count."""
LEARNING_RATES = (1e-4, 1e-2)
WEIGHT_DECAYS = (1e-6, 1e-1)
"""Ranges in which a trial draws its settings, uniformly in their logarithm."""
LANE = 4 << 32
"""The first of Purpose.ANALYSIS that are of trials: settings from here on, orders from ORDERS on."""
ORDERS = 5 << 32


class Trial(BaseModel):
    """One training of the CNN with settings of its own, and how many images it then got right."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trial: int
    learning_rate: float
    weight_decay: float
    steps: int
    """Updates after which it did best on the validation images."""
    validation: float
    test: float


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, H, W, C) and their classes, int64 (N,) from 0."""

    images: Pixels
    classes: NDArray[np.int64]


class SupervisedNet(nn.Module):
    """Images (N, C, H, W) float in [-1, 1] -> logits (N, classes): D without its last layer, and a linear one."""

    def __init__(self, config: NetworkConfig, classes: int) -> None:
        super().__init__()
        plain = {"label": (), "classes": (), "class_images": (), "conditioning": "projection"}
        self.trunk = build_discriminator(config.model_copy(update=plain))
        height, width = config.stages[1:]
        self.head = nn.Linear(self.trunk.activation_widths[-1] * height * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        *_, maps = self.trunk.activations(images)
        logits: Tensor = self.head(maps.flatten(1))
        return logits


def trials_file(key: str) -> str:
    """Return the name of the file of trials that depend on `key`: each protocol keeps its own."""
    return f"probe-control-{sha256_bytes(key.encode())[:8]}.jsonl"


def search(
    config: NetworkConfig, learn: Split, validation: Split, test: Split, trials: int, seed: int, file: Path, key: str
) -> list[Trial]:
    """Return `trials` trials: a random search, as the paper's. What `file` holds for the same `key` is not done again.

    A trial is a function of (seed, its number); `key` says what else it depends on.
    """
    done = _read(file, key)  # all of them stay, also where fewer are asked for
    with Progress("training the control", trials * STEPS, "updates", done=min(len(done), trials) * STEPS) as progress:
        for number in range(len(done), trials):
            done.append(_trial(config, learn, validation, test, number, seed, progress))
            known = [key, *(trial.model_dump_json() for trial in done)]
            write_atomic(file, "".join(f"{line}\n" for line in known).encode())
    return done[:trials]


def _trial(
    config: NetworkConfig, learn: Split, validation: Split, test: Split, number: int, seed: int, progress: Progress
) -> Trial:
    rate, decay = settings(seed, number)
    network = SupervisedNet(config, int(max(s.classes.max() for s in (learn, validation, test))) + 1)
    initialize(network, seed, lane=LANE + number)
    network.to(device()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=decay)
    best = Trial(trial=number, learning_rate=rate, weight_decay=decay, steps=0, validation=-1.0, test=-1.0)
    for step, rows in zip(range(1, STEPS + 1), _batches(len(learn.images), seed, number), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / STEPS)) / 2
        network.train()
        wanted = torch.from_numpy(learn.classes[rows]).to(device())
        optimizer.zero_grad()
        F.cross_entropy(network(to_network(learn.images[rows])), wanted).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        progress.advance(1)
        if step % EVERY == 0 and (right := _accuracy(network, validation)) > best.validation:
            best = best.model_copy(update={"steps": step, "validation": right, "test": _accuracy(network, test)})
    return best


def settings(seed: int, trial: int) -> tuple[float, float]:
    """Return the step size and the weight decay of a trial: log-uniform in their ranges, by (seed, trial)."""
    chances = raw_bits(seed, Purpose.ANALYSIS, 0, 2, lane=LANE + trial) / 2**64
    low, high = np.log([LEARNING_RATES, WEIGHT_DECAYS]).T
    rate, decay = np.exp(low + chances * (high - low))
    return float(rate), float(decay)


def _batches(images: int, seed: int, trial: int) -> Iterator[NDArray[np.int64]]:
    """Yield rows of batches for ever, every image once an epoch; a last batch that is not whole is left out."""
    batch = min(BATCH, images)
    for epoch in range(STEPS):
        order = permutation(images, seed, Purpose.ANALYSIS, lane=ORDERS + trial * STEPS + epoch)
        for start in range(0, images - batch + 1, batch):
            yield order[start : start + batch]


@torch.no_grad()
def _accuracy(network: nn.Module, split: Split) -> float:
    network.eval()
    starts = range(0, len(split.images), 4 * BATCH)
    logits = [network(to_network(split.images[start : start + 4 * BATCH])).argmax(1).cpu() for start in starts]
    return float((torch.cat(logits).numpy() == split.classes).mean())


def _read(file: Path, key: str) -> list[Trial]:
    """Return the trials in `file`, up to the first line that is not the next one; none if it is of another `key`."""
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    done: list[Trial] = []
    if lines[:1] != [key]:
        return done
    for number, line in enumerate(lines[1:]):
        try:
            trial = Trial.model_validate_json(line)
        except ValidationError:  # damaged
            break
        if trial.trial != number:
            break
        done.append(trial)
    return done


def best_of(trials: list[Trial]) -> Trial:
    """Return the trial with the best validation accuracy; among equals the first."""
    return max(trials, key=lambda trial: (trial.validation, -trial.trial))
