"""One command for a person with an NVIDIA GPU: parity, benchmark, a training smoke test, one file to send back.

    python benchmarks/gpu_check.py [OUT]

Runs tests/gpu, builds the engine that this machine can build, measures every backend (docs/export.md has the
protocol), trains a tiny run on the GPU for some seconds, and writes OUT/gpu_check.json. Ends with 1 when a step fails.
"""

import json
import platform
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from export.driver import driver_version

ROOT = Path(__file__).resolve().parent.parent
PRESET_WEIGHTS = """
import sys, torch
from pathlib import Path
from pipeline.config import load_config
from pipeline.networks import Generator, initialise
from pipeline.weights import serialise
config = load_config(sys.argv[1]).network
generator = Generator(config)
initialise(generator, 0, lane=0)
with torch.no_grad():
    for _ in range(10):
        generator(torch.rand(64, config.latent_dim) * 2 - 1)
Path(sys.argv[2]).write_bytes(serialise(generator.eval(), config, "raw", 0))
"""


def main() -> int:
    """Run all steps, also after one has failed; write the result file."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "gpu-check").resolve()
    if driver_version() is None:
        print("error: no NVIDIA GPU with a driver here: gpu-check has nothing to check", file=sys.stderr)
        return 69
    out.mkdir(parents=True, exist_ok=True)
    python = sys.executable
    export = [python, "-m", "export.cli"]
    results: list[dict[str, Any]] = [step("tests", [python, "-m", "pytest", "-rs", "tests/gpu"])]
    for preset in ("tutorial64", "paper64"):
        folder = out / preset
        folder.mkdir(exist_ok=True)
        weights = folder / "generator.safetensors"
        step(f"{preset} weights", [python, "-c", PRESET_WEIGHTS, preset, str(weights)])
        onnx = [*export, "onnx", "--ckpt", str(weights), "--out", str(folder)]
        results.append(step(f"{preset} onnx", onnx))
        models = [folder / "model.onnx"]
        if find_spec("tensorrt"):
            for precision in ("fp32", "tf32", "fp16"):
                plan = ["--precision", precision, "--name", f"engine_{precision}.plan"]
                trt = [*export, "trt", "--ckpt", str(weights), "--out", str(folder), *plan]
                results.append(step(f"{preset} trt {precision}", trt))
                models.append(folder / f"engine_{precision}.plan")
        bench = [*export, "bench", "--ckpt", str(weights), "--out", str(folder / "bench")]
        for model in models:
            bench += ["--model", str(model)] if model.exists() else []
        results.append(step(f"{preset} bench", bench))
        measured = folder / "bench" / "bench.json"
        results[-1]["bench"] = json.loads(measured.read_text()) if measured.exists() else None
    results.append(step("training smoke", training(out)))
    report = {
        "hardware": _run([python, "-c", "import torch; print(torch.cuda.get_device_name())"]),
        "driver_cuda": driver_version(),
        "system": platform.platform(),
        "commit": _run(["git", "rev-parse", "HEAD"]),
        "packages": _run([python, "-m", "pip", "freeze"]).splitlines(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "passed": all(result["passed"] for result in results),
        "steps": results,
    }
    (out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    for result in results:
        print(f"{'passed' if result['passed'] else 'FAILED'}  {result['step']}  ({result['seconds']:.0f} s)")
    print(f"wrote {out / 'gpu_check.json'}")
    return 0 if report["passed"] else 1


def training(out: Path) -> list[str]:
    """Return the command that trains the demo preset on the bundled faces for some batches, in bf16, on the GPU."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "bf16", "--dynamo_backend", "no"]
    cadence = ["schedule.total_images=25600", "schedule.checkpoint_every_images=12800"]
    run = ["pipeline/train.py", "--data", "data/faces", "--out", str(out / "run"), "--preset", "demo"]
    return [*launch, *run, *cadence]


def step(name: str, command: list[str]) -> dict[str, Any]:
    """Run one step, showing its output, and return how it went with the end of what it said."""
    print(f"\n== {name}: {' '.join(command)[:300]}", flush=True)
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    code = process.wait()
    seconds = time.monotonic() - began
    return {"step": name, "passed": code == 0, "exit_code": code, "seconds": seconds, "output": lines[-40:]}


def _run(command: list[str]) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
