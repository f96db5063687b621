"""Images per second of the adversarial update on a GPU, by every way to run it, beside the tutorial's loop.

    python benchmarks/gpu_training.py OUT.json            # one GPU, some four minutes
    python benchmarks/gpu_training.py OUT.json --dry-run  # the same code on the CPU, tiny: proves that it runs

For widths 64 and 128 and batches of 128 and 1,024: the tutorial's loop in its own float32 (TF32 where PyTorch allows
it) and in bf16; our update in bf16, eager, as a CUDA graph, and as a graph of compiled networks. Rounds are
interleaved, with an A/A control; a round ends with a synchronization. Beside the rates: kernels an update and the share
of the time in which the GPU is busy (torch.profiler), and two ceilings of the same run, a large matrix product and a
copy. OUT.json is written anew after every setting.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from hardware import describe  # benchmarks/hardware.py
from training import Update, tutorial  # benchmarks/training.py

from pipeline.common.errors import UserError
from pipeline.config import RunConfig, load_config
from pipeline.model.latents import latent_batches
from pipeline.training.step import AdversarialStep

SETTINGS = ((64, 128), (64, 1024), (128, 128))
"""(width, batch)."""
WARM_UP = 15
"""Updates before the first round: cuDNN chooses, networks are compiled, the graph is captured after eleven."""
ROUNDS = 15
ROUND_SECONDS = 0.25


def ours(config: RunConfig, accelerator: Accelerator, *overrides: str) -> Update:
    """Our update, with z and a batch from the host each time, as in training."""
    config = load_config(overrides=list(overrides), base=config)
    step = AdversarialStep(config, accelerator)
    size, count = config.network.image_size, config.recipe.batch
    reals = np.random.default_rng(0).integers(0, 256, (count, size, size, config.network.channels), np.uint8)
    pinned = torch.from_numpy(reals).pin_memory() if accelerator.device.type == "cuda" else torch.from_numpy(reals)
    latents = latent_batches(config, start=0)
    return lambda: step.update(pinned, next(latents), 0)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(update: Callable[[], object], device: torch.device, updates: int) -> float:
    """Return the seconds of some updates, all of their device work included."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(updates):
        update()
    synchronize(device)
    return time.perf_counter() - start


def rates(arms: dict[str, Update], device: torch.device, batch: int, rounds: int) -> dict[str, list[float]]:
    """Return images/s of every arm by round; every arm's round takes some ROUND_SECONDS."""
    updates = {}
    for name, update in arms.items():
        timed(update, device, WARM_UP)
        updates[name] = max(2, int(ROUND_SECONDS / (timed(update, device, 3) / 3)))
    found: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(rounds):
        for name in list(arms) if index % 2 == 0 else list(reversed(arms)):
            found[name].append(updates[name] * batch / timed(arms[name], device, updates[name]))
    return found


def profile(update: Update, device: torch.device, updates: int = 10) -> dict[str, float]:
    """Return the kernels of an update and the share of the time in which the GPU runs one; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        seconds = timed(update, device, updates)
    kernels = [event for event in recorded.events() if event.device_type.name == "CUDA"]
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
    return {"kernels_an_update": round(len(kernels) / updates, 1), "gpu_busy_share": round(busy / seconds, 3)}


def ceilings(device: torch.device, size: int) -> dict[str, float]:
    """Return TFLOP/s of a bf16 matrix product on random data, and GB/s of a copy, read and write counted."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(size * size, device=device)
    target = torch.empty_like(source)
    work: dict[str, tuple[Callable[[], object], float]] = {
        "bf16_tflops": (lambda: torch.mm(a, b), 2 * size**3 / 1e12),
        "copy_gb_per_second": (lambda: target.copy_(source), 2 * source.nbytes / 1e9),
    }
    found = {}
    for name, (run, amount) in work.items():
        timed(run, device, 3)
        found[name] = round(amount / min(timed(run, device, 1) for _ in range(10)), 1)
    return found


def measure(config: RunConfig, accelerator: Accelerator, rounds: int) -> dict[str, Any]:
    """Return the rates of one setting, each against both forms of the tutorial's loop."""
    device, batch = accelerator.device, config.recipe.batch
    arms = {
        "tutorial, float32": tutorial(config, device, bf16=False),
        "tutorial, bf16": tutorial(config, device, bf16=True),
        "tutorial, bf16, again": tutorial(config, device, bf16=True),
        "ours, eager": ours(config, accelerator, "runtime.graph=off"),
    }
    left_out = {}
    for name, more in {
        "ours, graph": ["runtime.graph=on"],
        "ours, graph, compiled": ["runtime.graph=on", "runtime.compile=true"],
    }.items():
        try:
            arms[name] = ours(config, accelerator, *more)
            timed(arms[name], device, WARM_UP)
        except (UserError, RuntimeError) as error:
            arms.pop(name, None)
            left_out[name] = str(error).splitlines()[0][:300]
    found = rates(arms, device, batch, rounds)
    result: dict[str, Any] = {"width": config.network.width, "batch": batch, "rounds": rounds, "left_out": left_out}
    for name, values in found.items():
        result[name] = {"images_per_second": round(statistics.median(values), 1)}
        for base in ("tutorial, float32", "tutorial, bf16"):
            ratios = [mine / other for mine, other in zip(values, found[base], strict=True)]
            result[name][f"x {base}"] = round(statistics.median(ratios), 2)
        result[name] |= profile(arms[name], device)
    return result


def main() -> None:
    """Measure every setting and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="tiny and on the CPU")
    options = parser.parse_args()
    accelerator = Accelerator(mixed_precision="bf16", cpu=options.dry_run)
    device = accelerator.device
    if device.type != "cuda" and not options.dry_run:
        parser.error("no GPU that PyTorch can use; --dry-run rehearses on the CPU")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none (rehearsal)"
    result: dict[str, Any] = {**describe(), "gpu": name, "ceilings": ceilings(device, 64 if options.dry_run else 8192)}
    result["settings"] = []
    for width, batch in ((4, 8),) if options.dry_run else SETTINGS:
        config = load_config("tutorial64", overrides=[f"network.width={width}", f"recipe.batch={batch}", "streams=8"])
        result["settings"].append(measure(config, accelerator, 2 if options.dry_run else ROUNDS))
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result["settings"][-1], indent=1), flush=True)


if __name__ == "__main__":
    main()
