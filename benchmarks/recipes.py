"""What is an option of the recipe worth, at equal images and at equal time?

    python benchmarks/recipes.py options    # each option beyond the paper, on 4,000 of the bundled faces
    python benchmarks/recipes.py small      # 200 and 1,000 of them, and what helps there
    python benchmarks/recipes.py transfer   # 500 drawn shapes, from noise and from a run on faces
    python benchmarks/recipes.py cost       # processor time of an update, with each option, against none

Hours on a CPU, one run a core; run it again to go on after an interruption. Images have 32 pixels, the network is the
demo's. Every run is what a user would start: `pipeline/train.py --preset demo`, with the overrides of its arm, and in
bf16 where the processor multiplies it. Seeds are those of SEEDS; without options those of OTHER_SEEDS too: the control.

Samples are compared with pictures that no run has seen: SWD x 1000, the kernel distance (KID x 1000) of the features of
the attribute classifier, which `dcgan-eval classifier` trains from the same faces, MS-SSIM of the samples, and for
small sets how far samples are from the nearest training picture, as a share of how far as many unseen pictures are.

Writes benchmarks/results/recipes.json and recipes.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import describe  # benchmarks/hardware.py
from PIL import Image, ImageDraw

from pipeline.checkpoints.reference import load_generator
from pipeline.common.imaging import Pixels
from pipeline.common.machine import available_cores, multiplies_bf16
from pipeline.common.storage import write_atomic
from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate
from pipeline.evaluation.classifier import FILE_NAME
from pipeline.evaluation.classifier_training import make_classifier
from pipeline.evaluation.images import ArrayImages, GeneratedImages
from pipeline.evaluation.metrics.extractors import load_extractor
from pipeline.evaluation.metrics.feature_distances import kernel_distance
from pipeline.evaluation.metrics.ms_ssim import ms_ssim
from pipeline.evaluation.metrics.swd import Sampling, distances, project
from pipeline.evaluation.nearest.nearest import Nearest, flat

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SEEDS, OTHER_SEEDS = (0, 1, 2), (3, 4, 5)
SIZE = 32
SAMPLES = 2_048
NONE = "no option"
CONTROL = "no option, other seeds"


@dataclass(frozen=True)
class Group:
    """Runs that are compared with each other."""

    data: tuple[str, ...]
    """Data sets that each arm is trained on."""
    images: tuple[int, ...]
    """Images seen at which samples are compared; the last is the length of a run."""
    arms: dict[str, tuple[str, ...]]
    """What is added to the command line of a run, by the name of the arm."""


AUGMENT = "recipe.augment=color,translation,cutout"
GROUPS = {
    "options": Group(
        ("faces",),
        (22_400, 44_800),
        {
            "no option": (),
            "paper's step size": ("learning_rate_g=2e-4", "learning_rate_d=2e-4"),
            "flips": ("recipe.flips=true",),
            "DiffAugment": (AUGMENT,),
            "hinge": ("recipe.loss=hinge",),
            "relativistic": ("recipe.loss=relativistic",),
            "R1, gamma 1, every 4th": ("recipe.r1=1", "recipe.penalty_interval=4"),
            "relativistic, R1 and R2": ("recipe.loss=relativistic", "recipe.r1=1", "recipe.r2=1"),
            "spectral norm": ("network.discriminator_norm=spectral",),
            "spectral norm, hinge": ("network.discriminator_norm=spectral", "recipe.loss=hinge"),
            "residual": ("network.architecture=residual",),
            "weight decay 1e-5": ("recipe.weight_decay=1e-5",),
            "BatchNorm of each unit": ("network.first_batchnorm=unit",),
            "updates in turn": ("recipe.alternate=true",),
        },
    ),
    "small": Group(
        ("faces-200", "faces-1000"),
        (12_800, 25_600, 51_200),
        {
            "no option": (),
            "flips": ("recipe.flips=true",),
            "DiffAugment": (AUGMENT,),
            "DiffAugment and flips": (AUGMENT, "recipe.flips=true"),
            "from shapes": ("--init-from", "{work}/shapes-500, no option, 0"),
            "from shapes, 2 stages frozen": ("--init-from", "{work}/shapes-500, no option, 0", "recipe.freeze_d=2"),
        },
    ),
    "transfer": Group(
        ("shapes-500",),
        (800, 1_600, 3_200, 6_400, 12_800, 25_600),
        {
            "no option": (),
            "from faces": ("--init-from", "{work}/faces, no option, {seed}"),
            "from faces, 2 stages frozen": ("--init-from", "{work}/faces, no option, {seed}", "recipe.freeze_d=2"),
        },
    ),
}


@dataclass(frozen=True)
class Run:
    """One run, and where it lies."""

    group: str
    data: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its directory."""
        return f"{self.data}, {self.arm}, {self.seed}"

    def start(self, work: Path) -> subprocess.Popen[bytes]:
        """Start the trainer; it resumes a run that it finds."""
        group = GROUPS[self.group]
        every = np.gcd.reduce(group.images)
        schedule = f"total_images={group.images[-1]} checkpoint_every_images={every} keep_checkpoints=99".split()
        schedule += f"evaluate_every_images={group.images[-1]} evaluate_samples=64 schedule.overhead_share=1".split()
        log = 640 if every % 640 == 0 else every  # checkpoints come at log boundaries
        schedule += [f"log_every_images={log}", f"recipe.seed={self.seed}", f"image_size={SIZE}"]
        arm = [word.format(work=work, seed=self.seed) for word in group.arms[self.arm]]
        command = [sys.executable, ROOT / "pipeline" / "train.py", "--data", work / "data" / self.data / "train"]
        command += ["--out", work / self.name, "--preset", "demo", *schedule, *arm]
        precision = {"ACCELERATE_MIXED_PRECISION": "bf16" if multiplies_bf16() else "no"}
        environment = os.environ | precision | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        log = (work / f"{self.name}.log").open("ab")
        return subprocess.Popen([str(word) for word in command], env=environment, stdout=log, stderr=log)


def runs_of(name: str) -> list[Run]:
    """Return the runs of a group, those that others begin from first."""
    group = GROUPS[name]
    return [Run(name, data, arm, seed) for arm in group.arms for data in group.data for seed in seeds(name, arm)]


def seeds(group: str, arm: str) -> tuple[int, ...]:
    """Return the seeds of an arm."""
    if group != "options":
        return SEEDS[:2]
    return (*SEEDS, *OTHER_SEEDS) if arm == NONE else SEEDS


def shapes(folder: Path, count: int) -> None:
    """Draw pictures of two overlapping discs, rectangles or triangles on a gradient: nothing like a face."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for index in range(count):
        low, high = draw.integers(0, 256, (2, 3))
        ramp = np.linspace(0, 1, 64)[:, None, None] * np.ones((1, 64, 1))
        image = Image.fromarray((low + (high - low) * ramp).astype(np.uint8))
        pen = ImageDraw.Draw(image)
        for _ in range(2):
            kind, x, y, radius = (int(draw.integers(*limits)) for limits in ((0, 3), (12, 52), (12, 52), (6, 20)))
            box, color = (x - radius, y - radius, x + radius, y + radius), tuple(draw.integers(0, 256, 3).tolist())
            if kind == 0:
                pen.ellipse(box, fill=color)
            elif kind == 1:
                pen.rectangle(box, fill=color)
            else:
                pen.regular_polygon((x, y, radius), 3, int(draw.integers(360)), fill=color)
        image.save(folder / f"{index:04d}.png")


def build(work: Path, faces: str) -> None:
    """Build the data sets that are missing, each cut into train and val."""
    if not (work / "shapes" / "0624.png").exists():
        shapes(work / "shapes", 625)
    faces_of = ("webdataset", faces)
    kinds = {
        "faces": (*faces_of, "--val-fraction", 0.2),
        "faces-200": (*faces_of, "--val-fraction", 0.2, "--limit", 250),
        "faces-1000": (*faces_of, "--val-fraction", 0.2, "--limit", 1250),
        "shapes-500": ("folder", work / "shapes", "--val-fraction", 0.2),
    }
    for name, (kind, source, *options) in kinds.items():
        out = work / "data" / name
        if not (out / "val" / "dataset.json").exists():
            words = ["build", kind, source, out, "--size", SIZE, "--encoding", "packed", *options]
            subprocess.run([Path(sys.executable).with_name("dcgan-data"), *map(str, words)], check=True)


def pictures(work: Path, data: str, part: str) -> Pixels:
    """Return the pictures of one part of a data set."""
    return np.concatenate(list(iterate(open_dataset(work / "data" / data / part))))


def unseen(work: Path, data: str) -> Pixels:
    """Return pictures that no run on `data` has seen; of small sets of faces, those that are left out of all."""
    return pictures(work, "faces" if data.startswith("faces") else data, "val")


class Judge:
    """Compares samples with pictures that a run has not seen."""

    def __init__(self, work: Path, data: str) -> None:
        folder = work / "classifier"
        if not (folder / FILE_NAME).exists():
            make_classifier(open_dataset(work / "data" / "faces" / "train"), folder, seed=0)
        self._extractor = load_extractor(str(folder / FILE_NAME))
        self._held_out = unseen(work, data)
        self._training = pictures(work, data, "train")[: len(self._held_out)]
        self._projected = project(ArrayImages(self._held_out), Sampling(), real=True)
        self._features = self._extractor.extract(self._held_out).features

    def judge(self, samples: Pixels) -> dict[str, float]:
        """Return the measures of samples, uint8 (N, H, W, C)."""
        images = ArrayImages(samples)
        kid, _ = kernel_distance(self._extractor.extract(samples).features, self._features, 0)
        away = [self._nearest(samples, others) for others in (self._training, self._held_out)]
        return {
            "swd": round(distances(self._projected, project(images, Sampling(), real=False))["swd"], 3),
            "kid": round(1000 * kid, 3),
            "ms_ssim": round(ms_ssim(images), 4),
            "nearest": round(away[0] / away[1], 4),
        }

    def _nearest(self, samples: Pixels, others: Pixels) -> float:
        nearest = Nearest(flat(samples[:512]))
        nearest.update(flat(others[: len(self._training)]))
        return float(nearest.distance.mean())

    def floor(self) -> dict[str, float]:
        """Return the measures of real pictures: those that were trained on."""
        return self.judge(self._training)


def evaluate(run: Run, work: Path, judge: Judge) -> dict[str, dict[str, float]]:
    """Evaluate a run's averaged generator at each number of images of its group; kept beside the run."""
    path = work / f"{run.name}.json"
    known: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    for seen in GROUPS[run.group].images:
        if str(seen) not in known:
            weights = work / run.name / "checkpoints" / f"{seen:012d}" / "generator_ema.safetensors"
            generator = load_generator(str(weights)).generator
            with torch.no_grad():
                samples = np.concatenate([block for _, block in GeneratedImages(generator, SAMPLES, 0).blocks()])
            known[str(seen)] = judge.judge(samples)
            write_atomic(path, json.dumps(known, indent=1) + "\n")
    return known


def work_off(runs: list[Run], work: Path, parallel: int) -> None:
    """Train the runs that are not done, so many at a time. A run waits for those it begins from."""
    running: dict[Run, subprocess.Popen[bytes]] = {}
    waiting = [run for run in runs if not (work / f"{run.name}.done").exists()]
    while waiting or running:
        while waiting and len(running) < parallel:
            run = waiting.pop(0)
            running[run] = run.start(work)
        time.sleep(1)
        for run, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[run]
            if process.returncode:
                raise SystemExit(
                    f"{work / run.name}.log: the run ended with {process.returncode}; start again to resume"
                )
            (work / f"{run.name}.done").touch()
            print(f"{run.name}: done, {len(waiting) + len(running)} to go", flush=True)


def table_of(name: str, work: Path) -> dict[str, Any]:
    """Evaluate a group: {data: {"arms": {arm: {measure: {images: [value of each seed]}}}, "real pictures": …}}."""
    found: dict[str, Any] = {}
    for data in GROUPS[name].data:
        judge = Judge(work, data)
        rows: dict[str, Any] = {}
        for arm in GROUPS[name].arms:
            for seed in seeds(name, arm):
                row = rows.setdefault(CONTROL if seed in OTHER_SEEDS else arm, {})
                for seen, measures in evaluate(Run(name, data, arm, seed), work, judge).items():
                    for measure, value in measures.items():
                        row.setdefault(measure, {}).setdefault(seen, []).append(value)
            print(f"{data}, {arm}: swd {rows[arm]['swd']}", flush=True)
        found[data] = {"arms": rows, "real pictures": judge.floor()}
    return found


def cost(rounds: int) -> dict[str, Any]:
    """Return the processor time of an update with each option, as a ratio to that of one without: median of rounds."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from pipeline.config import load_config
    from pipeline.model.latents import latent_batches
    from pipeline.training.step import AdversarialStep

    def update_of(words: tuple[str, ...]) -> Callable[[], None]:
        AcceleratorState._reset_state(reset_partial_state=True)
        config = load_config("demo", overrides=[f"image_size={SIZE}", *words])
        step = AdversarialStep(config, Accelerator(cpu=True, mixed_precision="bf16" if multiplies_bf16() else "no"))
        reals = np.random.default_rng(0).integers(0, 256, (config.recipe.batch, SIZE, SIZE, 3), np.uint8)
        latents = latent_batches(config, start=0)
        seen = iter(range(0, 1 << 62, config.recipe.batch))
        return lambda: step.update(reals, next(latents), next(seen))

    torch.set_num_threads(1)
    arms = {arm: update_of(words) for arm, words in GROUPS["options"].arms.items()}
    arms[CONTROL] = update_of(())
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(rounds + 1):
        for arm in list(arms) if number % 2 else reversed(arms):
            start = time.process_time()
            for _ in range(24):  # a multiple of the intervals of penalties, and of turns
                arms[arm]()
            if number:  # the first round warms up
                times[arm].append(time.process_time() - start)
    ratios = {arm: [mine / base for mine, base in zip(t, times[NONE], strict=True)] for arm, t in times.items()}
    return {arm: [round(q, 3) for q in statistics.quantiles(values, n=4)] for arm, values in ratios.items()}


def markdown(result: dict[str, Any]) -> str:
    """Return the results as tables: median and range of the seeds."""
    lines = [
        "Median (range) of three seeds, of two for small sets and shapes. SWD and KID × 1000 to pictures that no "
        "run has seen; lower is better."
    ]
    for name in GROUPS:
        for data, found in result.get(name, {}).items():
            seen = [str(images) for images in GROUPS[name].images][-4:]
            measures = ["swd", "kid", "ms_ssim", *(["nearest"] if name == "small" else [])]
            heads = [f"SWD, {int(images):,} images" for images in seen] + ["KID", "MS-SSIM", "nearest"][
                : len(measures) - 1
            ]
            lines += [
                "",
                f"**{data}**",
                "",
                "| |" + "".join(f" {head} |" for head in heads),
                "|---" * (len(heads) + 1) + "|",
            ]
            for arm, row in found["arms"].items():
                cells = [spread(row["swd"][images]) for images in seen]
                cells += [spread(row[measure][seen[-1]]) for measure in measures[1:]]
                lines.append(f"| {arm} |" + "".join(f" {cell} |" for cell in cells))
            real = found["real pictures"]
            cells = [""] * (len(seen) - 1) + [f"{real[measure]:.3g}" for measure in measures]
            lines.append("| real pictures that were trained on |" + "".join(f" {cell} |" for cell in cells))
    if "cost" in result:
        lines += ["", "| processor time of an update | median | quartiles |", "|---|---|---|"]
        lines += [f"| {arm} | {middle} | {low} to {high} |" for arm, (low, middle, high) in result["cost"].items()]
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Return the median and the range."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def main() -> None:
    """Do what is asked, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=[*GROUPS, "cost"])
    parser.add_argument("--work", type=Path, default=Path("demo/recipes"))
    parser.add_argument("--faces", default="data/faces")
    parser.add_argument("--parallel", type=int, default=available_cores(), help="runs at a time, one core each")
    parser.add_argument("--rounds", type=int, default=15, help="of cost")
    options = parser.parse_args()
    path = RESULTS / "recipes.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result.update(describe())
    build(options.work, options.faces)
    for name in options.what:
        if name == "cost":
            result["cost"] = cost(options.rounds)
        else:
            needed = {"small": [Run("transfer", "shapes-500", NONE, 0)]}
            needed["transfer"] = [Run("options", "faces", NONE, seed) for seed in SEEDS]
            work_off(needed.get(name, []), options.work, options.parallel)
            work_off(runs_of(name), options.work, options.parallel)
            result[name] = table_of(name, options.work)
        path.write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "recipes.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
