"""How fast is an update, and what does everything around it cost?

Two questions, each a ratio of interleaved rounds in one run (medians of 15, with an A/A control):

1. `step`: our update against the loop of every DCGAN tutorial, same networks, batch 64, 64x64, width 64; in fp32, and
   on CPUs with instructions for it (AMX, AVX512-BF16) in bf16, against the tutorial's fp32 and its loop under
   autocast.
2. `loop`: the whole trainer (loader, EMA, gradient norms, metrics, checkpoints) against a bare update on a tensor
   in memory, at the demo preset; and the share of /metrics alone.

    python benchmarks/training.py --data demo/data    # CPU, 15 minutes; writes benchmarks/results/training.json
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hardware import describe  # benchmarks/hardware.py
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from pipeline.common.machine import multiplies_bf16
from pipeline.config import RunConfig, load_config
from pipeline.model.latents import latent_batches
from pipeline.model.losses.non_saturating import discriminator_loss, generator_loss
from pipeline.model.networks import build_discriminator, build_generator, initialize
from pipeline.training.step import AdversarialStep

Update = Callable[[], None]

CPU = torch.device("cpu")


def tutorial(config: RunConfig, device: torch.device = CPU, *, bf16: bool = False) -> Update:
    """The loop of the PyTorch DCGAN tutorial on our networks: default memory order, Adam, five reads a step."""
    networks = build_generator(config.network).to(device), build_discriminator(config.network).to(device)
    for lane, network in enumerate(networks):
        initialize(network, 0, lane=lane)
    generator, discriminator = networks
    optimizer_g, optimizer_d = (torch.optim.Adam(n.parameters(), lr=2e-4, betas=(0.5, 0.999)) for n in networks)
    criterion = nn.BCEWithLogitsLoss()
    batch, shape = config.recipe.batch, config.network
    real = torch.rand(batch, shape.channels, shape.image_size, shape.image_size, device=device) * 2 - 1

    def forward(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            output: torch.Tensor = network(images)
        return output

    def update() -> None:
        discriminator.zero_grad()
        label = torch.ones(batch, device=device)
        output = forward(discriminator, real).float()
        loss_real = criterion(output, label)
        loss_real.backward()
        output.mean().item()
        fake = forward(generator, torch.randn(batch, shape.latent_dim, device=device))
        label.fill_(0.0)
        output = forward(discriminator, fake.detach()).float()
        loss_fake = criterion(output, label)
        loss_fake.backward()
        output.mean().item()
        optimizer_d.step()
        generator.zero_grad()
        label.fill_(1.0)
        output = forward(discriminator, fake).float()
        loss = criterion(output, label)
        loss.backward()
        output.mean().item()
        optimizer_g.step()
        (loss_real + loss_fake).item()
        loss.item()

    return update


def ours(config: RunConfig, precision: str = "no") -> Update:
    """AdversarialStep on a batch in memory."""
    AcceleratorState._reset_state(reset_partial_state=True)  # else the precision of the arm before
    step = AdversarialStep(config, Accelerator(cpu=True, mixed_precision=precision))
    network, count = config.network, config.recipe.batch
    reals = np.random.default_rng(0).integers(0, 256, (count, network.image_size, network.image_size, 3), np.uint8)
    latents = latent_batches(config, start=0)
    return lambda: step.update(reals, next(latents), 0)


def bare(config: RunConfig) -> Update:
    """Our levers and nothing else: no average, no statistics, no norms, data and z in memory."""
    networks = build_generator(config.network), build_discriminator(config.network)
    for lane, network in enumerate(networks):
        initialize(network, 0, lane=lane)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator, discriminator = networks
    optimizer_g = torch.optim.Adam(generator.parameters(), 2e-4, (0.5, 0.999), fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), 2e-4, (0.5, 0.999), fused=True)
    size, count = config.network.image_size, config.recipe.batch
    real = (torch.rand(count, 3, size, size) * 2 - 1).contiguous(memory_format=torch.channels_last)
    z = torch.rand(count, config.network.latent_dim) * 2 - 1

    def update() -> None:
        fake = generator(z)
        discriminator_loss(discriminator(real), discriminator(fake.detach())).backward()
        optimizer_d.step()
        optimizer_d.zero_grad()
        generator_loss(discriminator(fake)).backward(inputs=list(generator.parameters()))
        optimizer_g.step()
        optimizer_g.zero_grad()

    return update


def compare(arms: dict[str, Update], updates: int, images: int, rounds: int) -> dict[str, list[float]]:
    """Run the arms in turn, a round each, and return images/s by arm and round."""
    for update in arms.values():
        for _ in range(2):
            update()
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(rounds):
        names = list(arms) if index % 2 == 0 else list(reversed(arms))
        for name in names:
            start = time.perf_counter()
            for _ in range(updates):
                arms[name]()
            rates[name].append(updates * images / (time.perf_counter() - start))
        print(f"round {index + 1}/{rounds}: " + ", ".join(f"{name} {rates[name][-1]:.1f}" for name in arms), flush=True)
    return rates


def summarize(rates: dict[str, list[float]], against: str) -> dict[str, dict[str, float]]:
    """Return median rates, and the median and quartiles of the ratio within a round."""
    summary = {}
    for name, values in rates.items():
        ratios = [mine / base for mine, base in zip(values, rates[against], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        summary[name] = {
            "images_per_second": round(statistics.median(values), 1),
            f"ratio_to_{against}": round(middle, 3),
            "quartile_low": round(low, 3),
            "quartile_high": round(high, 3),
        }
    return summary


def limit(arms: dict[str, Update], images: int) -> dict[str, dict[str, float]]:
    """Return the operations of an image in each arm, and the rates at which matrix products alone would do them.

    Products of 2048x2048 matrices in the arm's precision, the best of 15, are what this processor can do at most.
    """
    peaks = {}
    for dtype in {torch.bfloat16 if "bf16" in name else torch.float32 for name in arms}:
        factors = torch.randn(2, 2048, 2048).to(dtype)
        seconds = []
        for _ in range(15):
            start = time.perf_counter()
            factors[0] @ factors[1]
            seconds.append(time.perf_counter() - start)
        peaks[dtype] = 2 * 2048**3 / min(seconds)
    found = {}
    for name, update in arms.items():
        if "compiled" in name or "again" in name:
            continue  # the counter sees eager operations
        with FlopCounterMode(display=False) as counter:
            update()
        flop, peak = counter.get_total_flops() / images, peaks[torch.bfloat16 if "bf16" in name else torch.float32]
        found[name] = {"gigaflop_an_image": round(flop / 1e9, 3), "images_per_second_at_most": round(peak / flop, 1)}
    return found


def shares(update: Update) -> dict[str, float]:
    """Return the share of an update's processor time that each operation takes, of those with more than a fiftieth."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(4):
            update()
    spent = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(spent.values())
    found = {name: round(time / total, 3) for name, time in spent.items() if time > total / 50}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def trainer_rounds(config: RunConfig, data: str, rounds: int, updates: int) -> dict[str, list[float]]:
    """Interleave the whole trainer, with and without a scraped endpoint's cost, and the bare update.

    Every round continues the same run by `updates` steps; starting up is not counted, saving is: the measured time
    of a checkpoint is spread over the images between two of them.
    """
    from pipeline.training.loop import train
    from pipeline.training.manager import CheckpointManager

    logging.disable(logging.INFO)
    plain = bare(config)
    batch = config.recipe.batch
    every = config.schedule.checkpoint_every_images
    rates: dict[str, list[float]] = {"bare": [], "bare again": [], "trainer": []}
    save_seconds: list[float] = []
    original = CheckpointManager.save

    def timed_save(self: CheckpointManager, *arguments: object) -> None:
        start = time.perf_counter()
        original(self, *arguments)  # type: ignore[arg-type]
        save_seconds.append(time.perf_counter() - start)

    CheckpointManager.save = timed_save  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory() as folder:
        for index in range(rounds):
            for name in ("bare", "trainer", "bare again") if index % 2 == 0 else ("bare again", "trainer", "bare"):
                if name != "trainer":
                    for _ in range(2):
                        plain()
                    start = time.perf_counter()
                    for _ in range(updates):
                        plain()
                    rates[name].append(updates * batch / (time.perf_counter() - start))
                    continue
                times: list[float] = []
                schedule = config.schedule.model_copy(
                    update={
                        "total_images": (index + 1) * (updates + 3) * batch,
                        "evaluate_samples": 64,
                        "grid_every_images": 10**9,
                        "evaluate_every_images": 10**9,
                        "checkpoint_every_images": 10**9,
                    }
                )
                train(
                    config.model_copy(update={"schedule": schedule}),
                    data=data,
                    out=Path(folder) / "run",
                    metrics_port=0,
                    on_batch=lambda *_, times=times: times.append(time.perf_counter()),
                )
                seconds = times[-1] - times[2]  # the first two updates warm up
                images = (len(times) - 3) * batch
                rates[name].append(images / (seconds + save_seconds[-1] * images / every))
            print(
                f"round {index + 1}/{rounds}: " + ", ".join(f"{name} {rates[name][-1]:.1f}" for name in rates),
                flush=True,
            )
    print(f"a checkpoint holds up the loop for {statistics.median(save_seconds) * 1e3:.0f} ms")
    rates["save_milliseconds"] = [1e3 * seconds for seconds in save_seconds]
    return rates


def telemetry_share(config: RunConfig, rounds: int) -> dict[str, float]:
    """Return what telemetry costs one step, and one log interval, in microseconds."""
    from pipeline.common.telemetry import Telemetry
    from pipeline.training.run_log import RunLog
    from pipeline.training.window import Report

    run_log = RunLog(config, None, Telemetry("train", run="benchmark"))
    names = ("loss_d", "loss_g", "d_real", "d_fake", "grad_norm_d", "grad_norm_g", "diversity")
    report = Report(
        whole=True,
        values=dict.fromkeys(names, 0.5),
        images=6400,
        steps=100,
        nonfinite_steps=0,
        weights_finite=True,
        hopeless_steps=0,
        stop=0,
        save=False,
        slowest_step_seconds=0.1,
        seconds=10.0,
        data_wait_seconds=0.1,
        step_seconds=9.9,
        affordable=0,
    )
    work = {
        "microseconds_a_step": lambda: run_log.step(0.1),
        "microseconds_an_interval": lambda: run_log.window(report, 6400),
    }
    costs: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            start = time.perf_counter()
            for _ in range(1000):
                call()
            costs[name].append((time.perf_counter() - start) / 1000 * 1e6)
    return {name: round(statistics.median(values), 2) for name, values in costs.items()}


def main() -> None:
    """Run both comparisons and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo/data", help="shards of 64x64 images")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["step", "loop"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training.json")
    options = parser.parse_args()
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    result.update(describe())
    if options.only != "loop":
        config = load_config("tutorial64", overrides=["recipe.batch=64"])
        levers = config.model_copy(update={"runtime": config.runtime.model_copy(update={"compile": True})})
        arms = {
            "tutorial": tutorial(config),
            "tutorial again": tutorial(config),
            "ours": ours(config),
            "ours, compiled": ours(levers),
        }
        if multiplies_bf16():  # elsewhere bf16 is twenty times slower than fp32
            arms["tutorial, bf16"] = tutorial(config, bf16=True)
            arms["ours, bf16"] = ours(config, "bf16")
            arms["ours, bf16, compiled"] = ours(levers, "bf16")
        rates = compare(arms, updates=2, images=64, rounds=options.rounds)
        setting = "64x64, width 64, batch 64, fp32 where no other precision is named"
        result["step"] = {"setting": setting, "rounds": options.rounds} | summarize(rates, "tutorial")
        result["step"]["limit"] = limit(arms, 64)
        result["step"]["shares"] = {name: shares(arms[name]) for name in ("ours", "ours, bf16") if name in arms}
        print(json.dumps(result["step"], indent=1))
    if options.only != "step":
        config = load_config("demo")
        rates = trainer_rounds(config, options.data, options.rounds, updates=24)
        saves = rates.pop("save_milliseconds")
        setting = f"preset demo: width {config.network.width}, batch {config.recipe.batch}"
        result["loop"] = {"setting": setting, "rounds": options.rounds} | summarize(rates, "bare")
        result["loop"]["checkpoint_milliseconds"] = round(statistics.median(saves), 1)
        result["loop"]["telemetry"] = telemetry_share(config, options.rounds)
        print(json.dumps(result["loop"], indent=1))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
