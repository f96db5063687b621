"""Does the pipeline train a better generator than the loop of the tutorials, given the same number of images?

    python benchmarks/quality.py --work demo/quality        # CPU: hours; run it again to resume after an interruption

Both arms have the same networks (64x64, width 32), batch of 32, Adam, learning rates, and training images (the bundled
faces), and run with three seeds. Both are evaluated by SWD and MS-SSIM against faces that neither arm was trained on,
after the same numbers of images and with the same number of samples.

"ours" is what a user gets: `pipeline/train.py --preset demo` at that width and batch, and the EMA generator of its
checkpoints. "ours, not averaged" is the generator that the average is taken over. "tutorial" is the PyTorch DCGAN
tutorial: normal z, a DataLoader that reshuffles, and the last generator, sampled in training mode as the tutorial does
(BatchNorm over the samples).

Writes benchmarks/results/quality.{json,png}, and a grid of the same z over time for each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import describe  # benchmarks/hardware.py
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pipeline.checkpoints.reference import load_generator
from pipeline.common.imaging import encode, labeled_sheet
from pipeline.common.machine import available_cores
from pipeline.common.randomness import Purpose
from pipeline.common.storage import write_atomic
from pipeline.config import RunConfig, load_config
from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate
from pipeline.evaluation import charts
from pipeline.evaluation.images import ArrayImages, GeneratedImages, Images
from pipeline.evaluation.metrics.ms_ssim import ms_ssim
from pipeline.evaluation.metrics.swd import Sampling, distances, project
from pipeline.model.networks import Generator, build_discriminator, build_generator, initialize
from pipeline.model.sampling import sample

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
TOTAL, EVERY = 307_200, 38_400
STEPS = list(range(EVERY, TOTAL + 1, EVERY))
SAMPLES = 4_096


def config(seed: int) -> RunConfig:
    """Return the demo preset, wider and longer, that keeps every checkpoint and evaluates only at its end."""
    size = "network.width=32 recipe.batch=32"
    schedule = f"total_images={TOTAL} checkpoint_every_images={EVERY} keep_checkpoints=99 grid_every_images={TOTAL}"
    evaluation = f"evaluate_every_images={TOTAL} evaluate_samples=1024 seed={seed}"
    return load_config("demo", overrides=f"{size} {schedule} {evaluation} schedule.overhead_share=1".split())


def train_ours(seed: int, data: Path, out: Path) -> None:
    """Run the trainer; it resumes a run that it finds."""
    from pipeline.training.loop import train

    train(config(seed), data=str(data), out=out)


def train_tutorial(seed: int, data: Path, out: Path) -> None:
    """Run the tutorial's loop and save its state every EVERY images; resume from the last state."""
    network, batch = tutorial_network(seed), config(seed).recipe.batch
    torch.manual_seed(seed)
    generator, discriminator = build_generator(network), build_discriminator(network)
    initialize(generator, seed, lane=0)
    initialize(discriminator, seed, lane=1)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    criterion = nn.BCEWithLogitsLoss()
    pixels = torch.from_numpy(np.concatenate(list(iterate(open_dataset(data))))).permute(0, 3, 1, 2).contiguous()
    loader = DataLoader(TensorDataset(pixels), batch, shuffle=True, drop_last=True)
    parts: dict[str, Any] = {"generator": generator, "discriminator": discriminator, "g": optimizer_g, "d": optimizer_d}
    seen = 0
    for path in sorted(out.glob("*.pt"))[-1:]:
        states = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(states[name])
        torch.set_rng_state(states["rng"])
        seen = int(path.stem)
    while seen < TOTAL:
        for (piece,) in loader:
            real = piece.float() / 127.5 - 1
            discriminator.zero_grad()
            label = torch.full((batch,), 1.0)
            criterion(discriminator(real), label).backward()
            fake = generator(torch.randn(batch, network.latent_dim))
            criterion(discriminator(fake.detach()), label.fill_(0.0)).backward()
            optimizer_d.step()
            generator.zero_grad()
            criterion(discriminator(fake), label.fill_(1.0)).backward()
            optimizer_g.step()
            seen += batch
            if seen % EVERY == 0:
                states = {name: part.state_dict() for name, part in parts.items()} | {"rng": torch.get_rng_state()}
                torch.save(states, out / f"{seen:09d}.partial")
                (out / f"{seen:09d}.partial").rename(out / f"{seen:09d}.pt")
                print(f"{out.name}: {seen:,} of {TOTAL:,} images", flush=True)
            if seen >= TOTAL:
                break


def tutorial_network(seed: int) -> Any:
    """Return the network of the demo with the tutorial's z."""
    return config(seed).network.model_copy(update={"latent_distribution": "normal"})


TRAIN = {"ours": train_ours, "tutorial": train_tutorial}


GENERATORS = {"ours": "ours", "ours, not averaged": "ours", "tutorial": "tutorial"}
"""What is compared, and the arm whose runs it comes from."""


def generator_at(name: str, seed: int, seen: int, out: Path) -> Generator:
    """Return the generator that a user would sample with after `seen` images."""
    if name != "tutorial":
        weights = "generator_ema" if name == "ours" else "generator"
        return load_generator(str(out / "checkpoints" / f"{seen:012d}" / f"{weights}.safetensors")).generator
    generator = build_generator(tutorial_network(seed))
    generator.load_state_dict(torch.load(out / f"{seen:09d}.pt", weights_only=True)["generator"])
    return generator.train()


def swd(held_out: Images, images: Images) -> float:
    """Return the sliced Wasserstein distance at the published setting, times 1000."""
    sampling = Sampling()
    return distances(project(held_out, sampling, real=True), project(images, sampling, real=False))["swd"]


def evaluate(generator: Generator, held_out: Images, seed: int) -> dict[str, float]:
    """Return the distance of fresh samples from the held-out images, and their diversity."""
    with torch.no_grad():
        samples = ArrayImages(np.concatenate([b for _, b in GeneratedImages(generator, SAMPLES, seed).blocks()]))
    return {"swd": swd(held_out, samples), "ms_ssim": ms_ssim(samples)}


def evaluate_run(name: str, seed: int, out: Path, held_out: Images) -> list[dict[str, float]]:
    """Evaluate the generators of a run at each of STEPS; the results are kept beside the run."""
    path = out / f"evaluated, {name}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for seen in STEPS:
        if str(seen) not in known:
            known[str(seen)] = evaluate(generator_at(name, seed, seen, out), held_out, seed)
            write_atomic(path, json.dumps(known, indent=1) + "\n")
    return [known[str(seen)] for seen in STEPS]


def main() -> None:
    """Train the runs that are missing, evaluate all of them, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("demo/quality"))
    parser.add_argument("--faces", default="data/faces")
    parser.add_argument("--parallel", type=int, default=available_cores(), help="runs at a time, one core each")
    parser.add_argument("--train", nargs=2, metavar=("ARM", "SEED"), help="train only this run, in this process")
    options = parser.parse_args()
    data = options.work / "data"
    runs = {(arm, seed): options.work / f"{arm}-{seed}" for seed in SEEDS for arm in TRAIN}
    if options.train:
        arm, seed = options.train[0], int(options.train[1])
        runs[arm, seed].mkdir(parents=True, exist_ok=True)
        TRAIN[arm](seed, data / "train", runs[arm, seed])
        (runs[arm, seed] / "done").touch()
        return
    if not (data / "val" / "dataset.json").exists():
        build = ["build", "webdataset", options.faces, str(data), "--size", "64", "--val-fraction", "0.2"]
        subprocess.run([Path(sys.executable).with_name("dcgan-data"), *build], check=True)
    waiting = [key for key, out in runs.items() if not (out / "done").exists()]
    running: list[subprocess.Popen[bytes]] = []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    while waiting or running:
        while waiting and len(running) < options.parallel:
            arm, seed = waiting.pop(0)
            command = [sys.executable, __file__, "--work", str(options.work), "--train", arm, str(seed)]
            running.append(subprocess.Popen(command, env=environment))
        time.sleep(1)
        if any(process.poll() for process in running):
            raise SystemExit("a run failed; start the benchmark again to resume it")
        running = [process for process in running if process.poll() is None]
    report(runs, data / "val")


def report(runs: dict[tuple[str, int], Path], val: Path) -> None:
    """Evaluate every saved generator; write the numbers, the curves and the grids."""
    held_out = ArrayImages(np.concatenate(list(iterate(open_dataset(val)))))
    curves: dict[str, Any] = {}
    for name, arm in GENERATORS.items():
        for seed in SEEDS:
            found = evaluate_run(name, seed, runs[arm, seed], held_out)
            for measure in ("swd", "ms_ssim"):
                curves.setdefault(name, {}).setdefault(measure, {})[seed] = [round(row[measure], 4) for row in found]
            print(f"{name}, seed {seed}: swd {curves[name]['swd'][seed]}", flush=True)
    results = ROOT / "benchmarks" / "results"
    result = describe() | {
        "setting": f"64x64, width 32, batch 32, {held_out.count} held-out faces, {SAMPLES} samples",
        "images": STEPS,
        "curves": curves,
        "final_median": {
            name: {measure: statistics.median(row[-1] for row in rows.values()) for measure, rows in measures.items()}
            for name, measures in curves.items()
        },
    }
    seen_set = ArrayImages(np.concatenate(list(iterate(open_dataset(val.parent / "train"))))[:SAMPLES])
    result["swd_of_training_images"] = round(swd(held_out, seen_set), 4)
    result["ms_ssim_of_held_out"] = round(ms_ssim(held_out), 4)
    (results / "quality.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, results / "quality.png")
    rows = []
    for name, arm in GENERATORS.items():
        for seen in (STEPS[0], STEPS[1], STEPS[3], STEPS[-1]):
            pixels = sample(generator_at(name, 0, seen, runs[arm, 0]), 0, Purpose.GRID, 0, 64)[:12]
            rows.append((f"{name}, {seen // 1000:,}k images", pixels))
    write_atomic(results / "quality_grids.webp", encode(labeled_sheet(rows), "webp"))


def draw(result: dict[str, Any], path: Path) -> None:
    """Plot SWD against images, one line for each seed."""
    figure, area = charts.axes(6)
    for color, name in zip(("tab:blue", "lightblue", "tab:orange"), GENERATORS, strict=True):
        for index, values in enumerate(result["curves"][name]["swd"].values()):
            area.plot(result["images"], values, color=color, label=name if index == 0 else None)
    area.axhline(result["swd_of_training_images"], color="gray", linestyle=":", label="training images")
    area.set_xlabel("images seen")
    area.set_ylabel("SWD ×10³ to held-out faces")
    area.set_ylim(bottom=0)
    area.legend(frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
