"""What an update costs the host: how many operations it launches, and in how many microseconds.

Ours against the update that it was before (a copy of it is here) and the loop of every DCGAN tutorial, at width 4,
with four images and one thread, in interleaved rounds with an A/A control. Then the loop around an update: z, the
order of images, bookkeeping; at batch 128, and for one of 64 ranks at batch 8,192.

    python benchmarks/host_overhead.py            # some minutes; writes benchmarks/results/host_overhead.{json,md}
    python benchmarks/host_overhead.py --quick    # less than a minute; writes nothing

The last line is JSON. Operations are those that PyTorch dispatches, without views, under bf16 autocast. Host time is
processor time of an update but for its passes through the networks: on a CPU even these small convolutions take
15 ms, so stand-ins with the same weights take their place. The result has the time with the networks as well. Time of
the loop is that of the thread which starts the updates; "all threads" counts those that work ahead of it, too.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hardware import describe  # benchmarks/hardware.py
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import Update, tutorial  # benchmarks/training.py

from pipeline.common.storage import Store
from pipeline.common.telemetry import Telemetry
from pipeline.config import RunConfig, load_config
from pipeline.data.dataset import DATASET_FILE, Dataset, open_dataset
from pipeline.data.loading.loader import run_loader
from pipeline.data.shard_writer import ShardWriter, write_shard
from pipeline.model import dcgan
from pipeline.model.latents import latent_batches, latent_blocks
from pipeline.model.losses.non_saturating import discriminator_loss, generator_loss
from pipeline.model.networks import build_discriminator, build_generator, initialize
from pipeline.training.run_log import RunLog
from pipeline.training.schedule import Schedule
from pipeline.training.step import AdversarialStep, deviation
from pipeline.training.stop_requests import StopRequests
from pipeline.training.update.ahead import Ahead
from pipeline.training.watchdog import Watchdog
from pipeline.training.window import Window

RESULTS = Path(__file__).parent / "results"
SMALL = load_config("tutorial64", overrides=["network.width=4", "recipe.batch=4", "recipe.streams=4"])
LOOPS = {"loop_microseconds_128": (128, 1), "loop_microseconds_8192_64": (8192, 64)}
"""Batch and processes of each measured loop."""
GOALS = {"operations": 180, "loop_microseconds_128": 150, "loop_microseconds_8192_64": 250}
VIEWS = {"alias", "detach", "expand", "permute", "slice", "split", "split_with_sizes", "t", "unsqueeze", "view"}


@contextmanager
def accelerator_of(precision: str) -> Iterator[Accelerator]:
    """Make an accelerator of its own, of which accelerate keeps only one in a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision=precision)
    AcceleratorState._reset_state(reset_partial_state=True)


def inputs(config: RunConfig) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return a batch of images and z."""
    network, count = config.network, config.recipe.batch
    shape = (count, network.image_size, network.image_size, network.channels)
    reals = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return reals, next(latent_batches(config, start=0))


def ours(config: RunConfig, accelerator: Accelerator) -> Update:
    """`AdversarialStep` as it is."""
    step, (reals, z) = AdversarialStep(config, accelerator), inputs(config)
    return lambda: step.update(reals, z, 0)


def former(config: RunConfig, accelerator: Accelerator) -> Update:
    """The update before it ran on fixed memory: accelerate's wrappers, numbers of the host, a counter in BatchNorm."""
    networks = build_generator(config.network), build_discriminator(config.network)
    for lane, network in enumerate(networks):
        initialize(network, 0, lane=lane)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = nn.BatchNorm2d
    generator, discriminator = networks
    average = build_generator(config.network)
    average.load_state_dict(generator.state_dict())
    adams = [torch.optim.Adam(network.parameters(), 2e-4, (0.5, 0.999), fused=True) for network in networks]
    prepared_g, adam_g = accelerator.prepare(generator, adams[0])
    prepared_d, adam_d = accelerator.prepare(discriminator, adams[1])
    totals = torch.zeros(10)
    images_seen = 0
    reals, noise = inputs(config)

    def update() -> None:
        nonlocal images_seen, totals
        images_seen += len(noise)
        real = torch.from_numpy(reals).permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)
        real = real.contiguous(memory_format=torch.channels_last)
        fake = prepared_g(torch.from_numpy(noise))
        real_logits, fake_logits = prepared_d(real), prepared_d(fake.detach())
        loss_d = discriminator_loss(real_logits, fake_logits)
        accelerator.backward(loss_d / 1)
        with torch.no_grad():
            probabilities = [real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()]
            outputs = [torch.stack([loss_d.detach(), *probabilities, deviation(real), deviation(fake)])]
        norm_d, bad_d = former_apply(accelerator, adam_d, discriminator)
        discriminator.requires_grad_(False)
        loss_g = generator_loss(discriminator(fake))
        accelerator.backward(loss_g / 1)
        discriminator.requires_grad_(True)
        norm_g, bad_g = former_apply(accelerator, adam_g, generator)
        half_life = min(config.recipe.ema_half_life_images, images_seen * config.recipe.ema_ramp_up)
        weight = 1.0 - 0.5 ** (len(noise) / max(half_life, 1e-8))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(generator.parameters()), weight)
        loss_d_mean, *means = torch.stack(outputs).mean(0).unbind()
        loss_g_mean = torch.stack([loss_g.detach()]).mean()
        bad, _ = torch.maximum(bad_d, bad_g), ~torch.isfinite(loss_d_mean + loss_g_mean)
        values = (loss_d_mean, loss_g_mean, *means[:2], norm_d, norm_g, bad, torch.zeros_like(bad), *means[2:])
        found = torch.stack([value.detach().float() for value in values])
        totals += torch.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)

    return update


def former_apply(accelerator: Accelerator, optimizer: Any, network: nn.Module) -> tuple[Tensor, Tensor]:
    """Step as that update did; return the gradients' norm, and whether it is not finite."""
    accelerator.unscale_gradients(optimizer)
    norm = nn.utils.get_total_norm([weight.grad for weight in network.parameters() if weight.grad is not None])
    bad = (~torch.isfinite(norm)).float()
    optimizer.optimizer.found_inf = bad
    optimizer.step()
    optimizer.zero_grad()
    return norm, bad


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that are not views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace != "profiler" and func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


class _Pass(torch.autograd.Function):
    """A pass through a network that has its weights and shapes, and does nothing."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], inputs: Tensor, *weights: Tensor) -> Tensor:
        ctx.like = (inputs, *weights)
        return inputs.new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        pairs = zip(ctx.like, ctx.needs_input_grad[1:], strict=True)
        return (None, *(torch.zeros_like(tensor) if needed else None for tensor, needed in pairs))


@contextmanager
def stand_ins() -> Iterator[None]:
    """Let networks do nothing."""

    def generate(self: Any, z: Tensor) -> Any:
        shape = (len(z), self.config.channels, self.config.image_size, self.config.image_size)
        return _Pass.apply(shape, z, *self.stand_in_weights)  # type: ignore[no-untyped-call]

    def discriminate(self: Any, images: Tensor) -> Any:
        return _Pass.apply((len(images),), images, *self.stand_in_weights)  # type: ignore[no-untyped-call]

    weights = cached_property(lambda self: list(self.parameters()))
    weights.__set_name__(nn.Module, "stand_in_weights")
    with ExitStack() as stack:
        for network, forward in ((dcgan.Generator, generate), (dcgan.Discriminator, discriminate)):
            stack.enter_context(patch.object(network, "forward", forward))
            stack.enter_context(patch.object(network, "stand_in_weights", weights, create=True))
        yield


def count_operations(update: Update) -> int:
    """Return how many operations one update dispatches."""
    for _ in range(2):
        update()
    counter = Counter()
    with counter:
        update()
    return counter.count


def loop_around(config: RunConfig, data: Dataset, world_size: int, resources: ExitStack) -> Callable[[], None]:
    """Return what the trainer's loop does in a step besides the update, on the last of `world_size` ranks."""
    rank = world_size - 1
    loader = resources.enter_context(run_loader(config, data, start=0, rank=rank, world_size=world_size))
    accelerator = resources.enter_context(accelerator_of("no"))
    window = Window(accelerator, StopRequests(), torch.zeros(10), 0, None)
    run_log = RunLog(config, None, Telemetry("train", run="benchmark"))
    schedule, watchdog, batch = (
        Schedule(config.schedule, 0, config.recipe.batch),
        Watchdog(60, None),
        config.recipe.batch,
    )
    blocks = latent_blocks(config, start=0, rank=rank, world_size=world_size)
    latents = resources.enter_context(closing(Ahead(blocks)))
    seen = 0

    def step() -> None:
        nonlocal seen
        start = time.perf_counter()
        with watchdog.waiting_for_data("data"):
            loader.next_batch()
        next(latents)
        seen += batch
        window.add(batch, seconds := time.perf_counter() - start)
        run_log.step(seconds)
        watchdog.beat()
        schedule.at_agreement(seen)

    return step


def write_images(folder: Path) -> Dataset:
    """Write a data set of the smallest images, so that copying them costs little beside ordering them."""
    store, shards = Store(folder), []
    for number in range(8):
        writer = ShardWriter(f"{number:06d}", "packed", [])
        for index, image in enumerate(np.random.default_rng(number).integers(0, 256, (8192, 32, 32, 1), np.uint8)):
            writer.add(image, f"{index:05d}", [])
        shards.append(write_shard(store, f"shard-{number:06d}.tar", writer))
    written = Dataset(
        image_size=32,
        channels=1,
        encoding="packed",
        source={"kind": "benchmark"},
        images=sum(shard.images for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        shards=shards,
    )
    store.write(DATASET_FILE, written.model_dump_json().encode())
    return open_dataset(str(folder))


def measure(
    arms: dict[str, Callable[[], None]], calls: int, rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Run the arms in turn, a round each, and return microseconds of processor time a call by arm and round."""
    for call in arms.values():
        for _ in range(20):
            call()
    found: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(rounds):
        for name in list(arms) if index % 2 == 0 else list(reversed(arms)):
            call = arms[name]
            start = clock()
            for _ in range(calls):
                call()
            found[name].append((clock() - start) / calls * 1e6)
    return found


def main() -> None:
    """Count, measure, write the result, and print it on one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds; write nothing")
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    rounds, calls = (11, 50) if options.quick else (options.rounds, 100)
    torch.set_num_threads(1)
    with accelerator_of("bf16") as accelerator:
        counts = {
            name: count_operations(make(SMALL, accelerator)) for name, make in (("ours", ours), ("former", former))
        }
    with accelerator_of("no") as accelerator:
        arms = {"ours": ours(SMALL, accelerator), "ours, again": ours(SMALL, accelerator)}
        arms |= {"former": former(SMALL, accelerator), "tutorial": tutorial(SMALL)}
        counts["tutorial"] = count_operations(arms["tutorial"])
        whole = {} if options.quick else measure(arms, calls // 5, rounds)
        with stand_ins():
            updates = measure(arms, calls, rounds)
    loops: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = write_images(Path(folder))
        for name, (batch, world_size) in LOOPS.items():
            sizes = ["network.image_size=32", "network.channels=1", f"recipe.batch={batch}", "recipe.streams=64"]
            with ExitStack() as resources:
                loop = {name: loop_around(load_config(overrides=sizes), data, world_size, resources)}
                loops |= measure(loop, 5 * calls, rounds, time.thread_time)
                loops |= measure({f"{name}, all threads": loop[name]}, 5 * calls, rounds)
    medians = {name: round(statistics.median(values), 1) for name, values in (updates | loops).items()}
    summary = {
        "operations": counts["ours"],
        "host_microseconds": medians["ours"],
        "tutorial_host_microseconds": medians["tutorial"],
        **{name: medians[name] for name in LOOPS},
    }
    if not options.quick:
        write_result(summary, counts, updates, whole, medians)
    print(", ".join(f"{name} {median:g} µs" for name, median in medians.items()))
    print(json.dumps(summary))


def write_result(
    summary: dict[str, float],
    counts: dict[str, int],
    updates: dict[str, list[float]],
    whole: dict[str, list[float]],
    medians: dict[str, float],
) -> None:
    """Write host_overhead.json, and host_overhead.md for people."""
    ratios = {
        name: [round(part, 3) for part in statistics.quantiles(map(float.__truediv__, values, updates["former"]), n=4)]
        for name, values in updates.items()
    }
    goals = GOALS | {"host_microseconds": medians["former"] / 2}
    verdicts = [
        f"{name}: {summary[name]:g} ({goal:g} at most: {'holds' if summary[name] <= goal else 'MISSED'})"
        for name, goal in goals.items()
    ]
    content = {
        **describe(),
        "setting": "tutorial64 at width 4, batch 4, fp32, one thread; operations under bf16 autocast",
        "rounds": len(updates["ours"]),
        "summary": summary,
        "operations": counts,
        "host_microseconds": medians,
        "microseconds_with_networks": {name: round(statistics.median(values)) for name, values in whole.items()},
        "ratio_to_former_quartiles": ratios,
        "verdicts": verdicts,
    }
    (RESULTS / "host_overhead.json").write_text(json.dumps(content, indent=1) + "\n")
    rows = [
        f"| {name} | {counts.get(name.removesuffix(', again'), '')} | {medians[name]:,.0f} | {ratios[name][1]:.2f} |"
        for name in updates
    ]
    lines = [
        f"{content['hardware']['cpu']}, one thread, {content['date']}. {content['setting']}.",
        "",
        "| an update | operations | host µs | of the former's |",
        "|---|---:|---:|---:|",
        *rows,
        "",
        *(f"- {verdict}" for verdict in verdicts),
    ]
    (RESULTS / "host_overhead.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
