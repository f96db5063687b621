"""The check of a machine with an NVIDIA GPU: parity, benchmark, a training smoke test, one result file.

    make gpu-check                                  installs what it needs into .venv first
    python benchmarks/gpu_check.py [OUT]

Runs tests/gpu, builds the engines that this machine can build, measures every backend (docs/export.md describes
how), trains a tiny run on the GPU for some seconds, and writes OUT/gpu_check.json. Its "result" is "passed" only when
nothing was left out, "incomplete" (exit code 69) when a library was missing or a test was skipped, "failed" (1) else.
"""

import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from export.format.driver import driver_version
from export.format.tensorrt_library import RTX_CAPABILITIES, this_gpu
from pipeline.common.errors import UnavailableError

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ("tutorial64", "paper64")
PRESET_WEIGHTS = """
import sys, torch
from pathlib import Path
from pipeline.config import load_config
from pipeline.model.networks import build_generator, initialize
from pipeline.checkpoints.weights import serialize
torch.manual_seed(0)
config = load_config(sys.argv[1]).network
generator = build_generator(config)
initialize(generator, 0, lane=0)
with torch.no_grad():
    for _ in range(10):
        generator(torch.rand(64, config.latent_dim) * 2 - 1)
Path(sys.argv[2]).write_bytes(serialize(generator.eval(), config, "raw", 0))
"""
NOT_FOR_THIS_MACHINE = "not possible:"
"""Start of the reason of a skip in tests/gpu that no installation would change."""

Step = dict[str, Any]


def main() -> int:
    """Run all steps, even after one has failed, and write the result file."""
    try:
        gpu = this_gpu()
    except UnavailableError as error:
        print(f"error: gpu-check has nothing to check: {error}", file=sys.stderr)
        return error.exit_code
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "gpu-check").resolve()
    for name in (*PRESETS, "run"):  # the files of an earlier check would pass for this one's
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    # One process for each TensorRT, because their Python modules cannot share one.
    steps = [tests(out, "tests", "not tensorrt-rtx")]
    if gpu.compute_capability in RTX_CAPABILITIES:
        steps.append(tests(out, "tests of TensorRT-RTX", "tensorrt-rtx"))
    for preset in PRESETS:
        steps += check_preset(out / preset, preset)
    steps.append(step("training smoke", training(out)))
    report = {
        "result": verdict(steps),
        "hardware": gpu.name,
        "driver_cuda": driver_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "commit": _run(["git", "rev-parse", "HEAD"]),
        "packages": _run([sys.executable, "-m", "pip", "freeze"]).splitlines(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "steps": steps,
    }
    (out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    for each in steps:
        print(f"{each['result']:10}  {each['step']}  ({each['seconds']:.0f} s)")
        for reason in each.get("missing", []):
            print(f"            {reason}")
    print(f"{report['result']}: wrote {out / 'gpu_check.json'}")
    return {"passed": 0, "failed": 1, "incomplete": UnavailableError.exit_code}[str(report["result"])]


def check_preset(folder: Path, preset: str) -> list[Step]:
    """Export a preset's generator, build its engines, and measure all of them."""
    export = [sys.executable, "-m", "export.cli"]
    folder.mkdir()
    weights = str(folder / "generator.safetensors")
    steps = [step(f"{preset} weights", [sys.executable, "-c", PRESET_WEIGHTS, preset, weights])]
    steps.append(step(f"{preset} onnx", [*export, "onnx", "--ckpt", weights, "--out", str(folder)]))
    for precision in ("fp32", "tf32", "fp16"):
        options = ["--precision", precision, "--name", f"engine_{precision}.plan"]
        trt = [*export, "trt", "--ckpt", weights, "--out", str(folder), *options]
        steps.append(step(f"{preset} trt {precision}", trt))
    bench = [*export, "bench", "--ckpt", weights, "--out", str(folder / "bench")]
    for model in (folder / "model.onnx", *sorted(folder.glob("*.plan"))):
        bench += ["--model", str(model)]
    steps.append(step(f"{preset} bench", bench))
    measured = folder / "bench" / "bench.json"
    steps[-1]["bench"] = json.loads(measured.read_text()) if measured.exists() else None
    return steps


def tests(out: Path, name: str, chosen: str) -> Step:
    """Run the tests of tests/gpu that match `chosen` (pytest -k), and count the skipped ones."""
    report = out / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-rs", "tests/gpu", "-k", chosen, f"--junitxml={report}"]
    return counted(step(name, command), report.read_text() if report.exists() else "<testsuites/>")


def counted(result: Step, junit: str) -> Step:
    """Return a step with its numbers of tests. It is incomplete if a test was skipped that could run here."""
    cases = ElementTree.fromstring(junit).iter("testcase")
    skips = [case.find("skipped") for case in cases]
    reasons = [skip.get("message", "") for skip in skips if skip is not None]
    missing = sorted({reason for reason in reasons if not reason.startswith(NOT_FOR_THIS_MACHINE)})
    if result["result"] == "passed" and (missing or len(skips) == len(reasons)):
        result["result"] = "incomplete"
    return {**result, "tests": len(skips), "skipped": len(reasons), "skips": sorted(set(reasons)), "missing": missing}


def verdict(steps: list[Step]) -> str:
    """Return failed if a step failed, else incomplete if one is incomplete, else passed."""
    results = {each["result"] for each in steps}
    return next(result for result in ("failed", "incomplete", "passed") if result in results)


def training(out: Path) -> list[str]:
    """Return the command that trains the demo preset on the bundled faces for 25,600 images, in bf16, on the GPU."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "bf16", "--dynamo_backend", "no"]
    cadence = ["schedule.total_images=25600", "schedule.checkpoint_every_images=12800"]
    run = ["pipeline/train.py", "--data", "data/faces", "--out", str(out / "run"), "--preset", "demo"]
    return [*launch, *run, *cadence]


def step(name: str, command: list[str]) -> Step:
    """Run one step, print its output, and return its result and its last 40 lines."""
    print(f"\n== {name}: {' '.join(command)[:300]}", flush=True)
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    code = process.wait()
    result = {0: "passed", UnavailableError.exit_code: "incomplete"}.get(code, "failed")
    seconds = time.monotonic() - began
    return {"step": name, "result": result, "exit_code": code, "seconds": seconds, "output": lines[-40:]}


def _run(command: list[str]) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
