"""What share of the time do evaluations, checkpoints and grids stop the training for?

    python benchmarks/overhead.py                       # CPU, some 3 minutes; writes benchmarks/results/overhead.json
    python benchmarks/overhead.py --former ../former    # also measures an earlier checkout's trainer, by its own code

Trains on the bundled faces (32 pixels, width 4) with the default schedule, of which every interval is divided by 16: so
a CPU that sees 1,000 images a second meets them as often as a GPU that sees 16,000. Every arm sees as many images, in a
process of its own:

- `intervals`: `schedule.overhead_share=1`, and the loop waits until each checkpoint is written;
- `default`: what a run does that says nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hardware import describe  # benchmarks/hardware.py

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "overhead.json"
IMAGES = 32_000
FASTER = 16
SETTINGS = ("network.image_size=32", "network.width=4", "network.latent_dim=16", "recipe.batch=128")
PHASES = ("grid", "evaluate", "checkpoint")


def run(arm: str, data: str, images: int) -> dict[str, Any]:
    """Train in this process and return what stopped the training, in seconds by phase."""
    from pipeline.common.telemetry import Telemetry
    from pipeline.config import load_config
    from pipeline.training.loop import train

    seconds = dict.fromkeys(PHASES, 0.0)
    times = dict.fromkeys(PHASES, 0)
    begun: list[float] = []
    add = Telemetry.add

    def noted(self: Telemetry, name: str, amount: float = 1.0, **labels: str) -> None:
        if name == "dcgan_train_phase_seconds_total" and labels["phase"] in seconds and begun:
            seconds[labels["phase"]] += amount
            times[labels["phase"]] += 1
        add(self, name, amount, **labels)

    Telemetry.add = noted  # type: ignore[method-assign]
    share = []
    if arm == "intervals":
        from pipeline.checkpoints.saver import Saver

        Saver.start = lambda self, work: work()  # type: ignore[method-assign]
        share = ["schedule.overhead_share=1"]
    schedule = load_config().schedule
    names = [f"{task}_every_images" for task in ("log", "grid", "checkpoint", "evaluate")]
    intervals = [f"schedule.{name}={getattr(schedule, name) // FASTER}" for name in names]
    config = load_config(None, None, [*SETTINGS, *intervals, f"schedule.total_images={images}", *share])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        train(config, data=data, out=out, on_batch=lambda *_: begun.append(time.perf_counter()))
        wall = time.perf_counter() - begun[0]  # to the end: the last checkpoint is waited for
    stopped = sum(seconds.values())
    return {
        "seconds": round(wall, 1),
        "share_stopped": round(stopped / wall, 4),
        "images_per_second": round(images / wall),
        **{f"{name}_seconds": round(value, 2) for name, value in seconds.items()},
        **{f"{name}_times": value for name, value in times.items()},
    }


def measure(arm: str, root: Path, data: Path, images: int) -> dict[str, Any]:
    """Return what `run` returns, from a process that imports the code in `root`."""
    command = [sys.executable, __file__, "--images", str(images), "--arm", arm, str(data)]
    environment = os.environ | {"PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{arm}: {result}", flush=True)
    return result


def main() -> None:
    """Measure all arms and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--former", type=Path, help="an earlier checkout, whose trainer is measured as well")
    parser.add_argument("--arm", nargs=2, metavar=("ARM", "DATA"), help="train only this one, in this process")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.arm:
        arm, data = options.arm
        print(json.dumps(run(arm, data, options.images)))
        return
    arms = {"former": options.former.resolve()} if options.former else {}
    arms |= {"intervals": ROOT, "default": ROOT}
    with tempfile.TemporaryDirectory() as folder:
        faces = Path(folder) / "faces"
        build = ["build", "webdataset", str(ROOT / "data" / "faces"), str(faces), "--size", "32"]
        subprocess.run([Path(sys.executable).with_name("dcgan-data"), *build], check=True)
        found = {arm: measure(arm, root, faces, options.images) for arm, root in arms.items()}
    setting = f"default intervals / {FASTER}, {options.images:,} images, {', '.join(SETTINGS)}"
    options.out.write_text(json.dumps({**describe(), "setting": setting, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
