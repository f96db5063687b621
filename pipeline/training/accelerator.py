"""The processes of a run: how accelerate sets them up, and the few things that all of them do together."""

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline.common.errors import ConfigConflict, TryAgainError, UnavailableError, UserError, describe_os_error
from pipeline.common.machine import available_threads, cores_near
from pipeline.common.telemetry import Telemetry
from pipeline.data.loading.thread_pool import ThreadPool
from pipeline.training.rendezvous.meet import meet
from pipeline.training.watchdog import Peers

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS = 5.0
"""How often ranks meet that wait for a long piece of work of the main process."""

BUCKET_MB = 4
"""Gradients that DDP sends at once. With its own 25, most of these networks' would wait for the last layer's."""

HARMLESS = ("", "no", "false", "0")
REFUSED_SETTINGS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ((*HARMLESS, "1"), "use runtime.accumulate"),
    "ACCELERATE_DYNAMO_BACKEND": (HARMLESS, "use runtime.compile=true"),
    "ACCELERATE_USE_DEEPSPEED": (HARMLESS, "the networks fit one device: DDP is all they need"),
    "ACCELERATE_USE_FSDP": (HARMLESS, "the networks fit one device: DDP is all they need"),
    "ACCELERATE_USE_MEGATRON_LM": (HARMLESS, "the networks fit one device: DDP is all they need"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (HARMLESS, "the networks fit one device: DDP is all they need"),
    "ACCELERATE_MIXED_PRECISION": ((*HARMLESS, "bf16", "fp16"), "use bf16, fp16 or no"),
}
"""Settings of accelerate that would change or break training unseen: what is allowed, and what to do instead."""


def make_accelerator() -> Accelerator:
    """Return the accelerator that launch options and environment ask for.

    Raises UnavailableError when this machine cannot do the precision; ConfigConflict for a setting of accelerate that
    training does not follow, and when two processes would share a GPU over NCCL, which refuses that only later.
    """
    check_environment(os.environ)
    try:
        accelerator = Accelerator()
    except ValueError as error:
        raise UnavailableError(f"--mixed_precision: {error}; use bf16, or no") from None
    if accelerator.mixed_precision == "fp16" and not accelerator.native_amp:
        raise UnavailableError("--mixed_precision fp16: accelerate would train in float32 on the CPU; use bf16, or no")
    if torch.get_num_threads() > available_threads():  # of a container's limit, torch knows nothing
        torch.set_num_threads(available_threads())
    if accelerator.device.type == "cuda" and accelerator.num_processes > 1:
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if torch.distributed.get_backend() == "nccl" and processes > gpus:
            raise ConfigConflict(
                f"{processes} processes on a machine with {gpus} GPUs: each needs one of its own; start {gpus}"
            )
        _stay_near(accelerator.device)
    return accelerator


def pci_address(device: torch.device) -> str:
    """Return where a GPU sits, as the system names it (`0000:3b:00.0`); empty where PyTorch does not say."""
    gpu = torch.cuda.get_device_properties(device)
    domain, bus, slot = (getattr(gpu, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
    return f"{domain:04x}:{bus:02x}:{slot:02x}.0" if bus is not None else ""


def _stay_near(device: torch.device) -> None:
    """Keep this process and the threads that it will start on the NUMA node of its GPU, beside other processes.

    accelerate's own `--enable_cpu_affinity` counts the GPUs by NVML, which does not know CUDA_VISIBLE_DEVICES. A
    process that has the machine for itself keeps all cores for its loader.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
        return
    if cores := cores_near(pci_address(device)):
        os.sched_setaffinity(0, cores)
        log.info("%s: on the %d cores of its NUMA node", device, len(cores))


def set_kernels(accelerator: Accelerator, *, tf32: bool) -> None:
    """Let cuDNN time its algorithms and take the fastest, and choose the precision of float32 on CUDA.

    Batches never change their size, so each choice is made once. It may differ from one start of a run to the next,
    and bits with it: equal bytes are promised on the CPU alone.
    """
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = tf32


def reduce_gradients(network: nn.Module, accelerator: Accelerator, *, compress: bool) -> nn.Module:
    """Return `network` such that its gradients become the means over all ranks, while the backward pass goes on.

    `compress` sends them as bfloat16.
    """
    if accelerator.num_processes == 1:
        return network
    # Buffers are not broadcast: D runs twice before one backward. They are averaged before saving instead.
    # torch 2.13 renames the option to one that torch 2.11 does not know.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    wrapped = DistributedDataParallel(
        network,
        device_ids=[accelerator.device] if accelerator.device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        bucket_cap_mb=BUCKET_MB,
    )
    if compress:
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def check_environment(environment: Mapping[str, str]) -> None:
    """Raise ConfigConflict for a setting of accelerate, from its launcher or a config file, that training ignores."""
    for name, (allowed, instead) in REFUSED_SETTINGS.items():
        if (value := environment.get(name, "")).lower() not in allowed:
            raise ConfigConflict(
                f"{name}={value}: training does not follow this setting of accelerate (its launcher's options, or "
                f"default_config.yaml); unset it: {instead}"
            )


def meet_peers(telemetry: Telemetry | None = None) -> Peers | None:
    """Return what the ranks tell each other beside their collectives, when all have come; None for a process alone.

    `telemetry` shows how long this one waits for them.

    Raises ConfigConflict as `make_accelerator` does, TryAgainError as `meet` does.
    """
    check_environment(os.environ)

    def waited(seconds: float) -> None:
        if telemetry is not None:
            telemetry.set("dcgan_train_waiting_seconds", seconds)

    found = meet(waited=waited)
    return None if found is None else Peers(*found)


def together(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Return `work()` of this rank if it succeeds on every rank; else raise on all of them what any rank raised.

    So a rank that alone cannot start takes the others with it at once, with its own exit code and its own words.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except OSError as error:
        failure = describe_os_error(error)
    except Exception as error:
        failure = error
    if accelerator.num_processes > 1:
        mine = (accelerator.process_index, _public_kind(failure), str(failure)) if failure is not None else None
        failures = [found for found in gather_object([mine]) if found is not None]
        if failures and (failure is None or isinstance(failure, UserError)):
            rank, kind, words = failures[0]
            shared = kind(words if len(failures) == accelerator.num_processes else f"rank {rank}: {words}")
            shared.on_all_ranks = True
            failure = shared
    if failure is not None:
        raise failure
    return cast(T, result)


def from_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Return on every rank what `work()` returns on the main process, however long that takes.

    What it raises is raised on all ranks. The others meet the main process every POLL_SECONDS: one collective that
    waits for it would end after minutes with a timeout.
    """
    if accelerator.num_processes == 1:
        return work()
    # In a thread of ThreadPool, because those do not hold up an exit.
    running = ThreadPool(1, "main-process").submit(work) if accelerator.is_main_process else None
    done = False
    while not done:
        if running is not None:
            wait([running], POLL_SECONDS)
        state = torch.tensor([float(running is not None and running.done())], device=accelerator.device)
        done = bool(accelerator.reduce(state, "sum").item())
    found = [together(accelerator, lambda: None if running is None else running.result())]
    broadcast_object_list(found)
    return cast(T, found[0])


def _public_kind(failure: Exception) -> type[UserError]:
    """Return the class of `pipeline.common.errors` that says what a failure means to the other ranks."""
    if not isinstance(failure, UserError):
        return TryAgainError
    return next(kind for kind in type(failure).__mro__ if kind.__module__ == UserError.__module__)


def wait_for_all(accelerator: Accelerator) -> None:
    """Return when all processes have come here.

    Not accelerate's `wait_for_everyone`: it names a GPU by local rank to `barrier`, even for processes on the CPU, or
    that share one.
    """
    accelerator.reduce(torch.zeros(1, device=accelerator.device), "sum").item()


def average_batchnorm(network: nn.Module, accelerator: Accelerator) -> None:
    """Make the running BatchNorm statistics equal on all ranks: their mean."""
    if accelerator.num_processes == 1:
        return
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    torch.distributed.all_reduce(flat)
    flat /= accelerator.num_processes
    means = torch.split(flat, [buffer.numel() for buffer in buffers])
    for buffer, mean in zip(buffers, means, strict=True):
        buffer.copy_(mean.view_as(buffer))
