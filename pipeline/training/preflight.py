"""What is refused before the first step because it cannot work, and what is worth a warning."""

import logging
import os

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from pipeline.common.errors import ConfigConflict
from pipeline.common.machine import available_cores, multiplies_bf16
from pipeline.config import RunConfig
from pipeline.data.dataset import Dataset
from pipeline.data.loading.device_set import free_bytes
from pipeline.model.footprint import at_most, footprint

log = logging.getLogger(__name__)

SMALL_BATCHNORM = 16
LARGE_BATCH = 1_024


def check_settings(config: RunConfig, dataset: Dataset, accelerator: Accelerator) -> None:
    """Raise ConfigConflict for settings that these processes, this device or this data set cannot honor."""
    config.check_processes(accelerator.num_processes)
    if config.recipe.sync_batchnorm and accelerator.num_processes > 1 and accelerator.device.type != "cuda":
        raise ConfigConflict("recipe.sync_batchnorm=true works on CUDA only; this run is on the CPU: leave it false")
    if config.recipe.r1 or config.recipe.r2:
        _check_second_derivatives(config, accelerator)
    _check_memory(config, accelerator)
    for name in ("image_size", "channels"):
        has, wanted = getattr(dataset, name), getattr(config.network, name)
        if has != wanted:
            raise ConfigConflict(
                f"--data {dataset.location} holds images of {name} {has}, network.{name} is {wanted}; "
                f"set network.{name}={has} or build the shards again"
            )


def _check_memory(config: RunConfig, accelerator: Accelerator) -> None:
    """Raise ConfigConflict when an update certainly needs more memory than the device has free."""
    accumulate, network = config.runtime.accumulate, config.network
    share = config.recipe.batch // accelerator.num_processes
    free = free_bytes(device := accelerator.device)
    if device.type == "cpu":
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # which share this machine
    if at_most(network, share) <= free:
        return
    found = footprint(network)

    def needed(parts: int) -> int:
        value_bytes = 4 if accelerator.mixed_precision == "no" else 2
        apart = parts > 1 or config.recipe.alternate
        return found.update_bytes(share // parts, apart=apart, value_bytes=value_bytes)

    if needed(accumulate) <= free:
        return
    divisors = (parts for parts in range(accumulate + 1, share + 1) if not share % parts)
    parts = next((parts for parts in divisors if needed(parts) <= free), 0)
    advice = f"use runtime.accumulate={parts}, or lower recipe.batch" if parts else "lower network.width"
    raise ConfigConflict(
        f"network.image_size={network.image_size} with network.width={network.width}: an update of {share:,} images in "
        f"{accumulate} parts needs at least {needed(accumulate) / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB "
        f"free for a process; {advice}"
    )


def _check_second_derivatives(config: RunConfig, accelerator: Accelerator) -> None:
    """Raise ConfigConflict where D's gradient, which penalties differentiate once more, has no such derivative."""
    obstacle = None
    if config.runtime.compile:
        obstacle = "runtime.compile=true gives none; leave it false"
    elif config.recipe.sync_batchnorm and accelerator.num_processes > 1:
        obstacle = "recipe.sync_batchnorm=true gives none; leave it false"
    elif accelerator.mixed_precision == "fp16":
        obstacle = "in fp16 they overflow; use bf16, or no"
    if obstacle is not None:
        raise ConfigConflict(f"recipe.r1 and recipe.r2 need second derivatives of the discriminator: {obstacle}")


def check_ranks_agree(config: RunConfig, dataset: Dataset, accelerator: Accelerator) -> None:
    """Raise ConfigConflict on every rank unless all have the same settings and data; else they hang or diverge."""
    if accelerator.num_processes == 1:
        return
    mine = {f"{section}.{key}": value for section, keys in config.model_dump().items() for key, value in keys.items()}
    mine["data"] = dataset.fingerprint()[:12]
    first, *others = gather_object([mine])
    for rank, other in enumerate(others, 1):
        keys = sorted(first.keys() | other.keys())
        if different := [
            f"{key} {first.get(key)} and {other.get(key)}" for key in keys if first.get(key) != other.get(key)
        ]:
            raise ConfigConflict(
                f"ranks 0 and {rank} have different settings: {'; '.join(different)}. "
                "Start all of them with the same options and data (without --preset, each reads its own --out)"
            )


def warn(config: RunConfig, accelerator: Accelerator, *, from_noise: bool) -> None:
    """Say what works but wastes the machine or the batch. `from_noise` says that the run began without weights."""
    if config.recipe.freeze_d and from_noise:
        log.warning(
            "recipe.freeze_d=%d keeps the first stages of D at their noise; it is meant for --init-from",
            config.recipe.freeze_d,
        )
    _warn_about_batch(config, accelerator.num_processes)
    _warn_about_threads(accelerator, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "no" and multiplies_bf16():
        log.info("this processor multiplies bfloat16: with --mixed_precision bf16 an update may take half the time")


def _warn_about_threads(accelerator: Accelerator, processes: int) -> None:
    """Say when cores are idle: launchers give a process one thread unless told otherwise, and all of them read this.

    `processes` share this machine.
    """
    cores = available_cores()
    if accelerator.device.type == "cpu" and (threads := torch.get_num_threads()) * processes < cores:
        log.info("%d of %d cores in use; OMP_NUM_THREADS=%d uses all", threads * processes, cores, cores // processes)


def _warn_about_batch(config: RunConfig, world_size: int) -> None:
    """Say what BatchNorm and Adam make of the batch at this number of processes."""
    recipe = config.recipe
    share = recipe.batch // world_size // config.runtime.accumulate
    if share < SMALL_BATCHNORM and not (recipe.sync_batchnorm and world_size > 1):
        log.warning(
            "BatchNorm sees only %d images at a time; below %d its statistics are noise: "
            "use recipe.sync_batchnorm=true (CUDA), a larger recipe.batch, or fewer processes",
            share,
            SMALL_BATCHNORM,
        )
    if recipe.batch > LARGE_BATCH and recipe.learning_rate_d == recipe.learning_rate_g == 2e-4:
        log.warning(
            "recipe.batch=%d with the paper's learning rate of 2e-4 for batch 128: "
            "for Adam try up to sqrt(batch / 128) times as much, and watch D(real) - D(fake)",
            recipe.batch,
        )
