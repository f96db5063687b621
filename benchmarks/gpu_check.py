"""The check of a machine with an NVIDIA GPU: parity, speed, a training run, one result file.

    make gpu-check                                      installs what it needs into .venv first
    python benchmarks/gpu_check.py [OUT]
    python benchmarks/gpu_check.py [OUT] --dry-run      a rehearsal on the CPU: tiny, and says nothing of a GPU

Its parts come in the order of their worth, each with a time limit of its own, because a GPU may be there for minutes
only: tests/gpu; the training update by every way to run it (gpu_training.py); sampling by PyTorch and ONNX Runtime;
generation to disk; a training run of the bundled faces, for as long as its limit; and then the engines that this
machine can build, measured as docs/export.md describes. A part that fails or runs out of time does not stop the
others.

OUT/gpu_check.json is written anew after every part. Its "result" is "passed" only when nothing was left out,
"incomplete" (exit code 69) when a library was missing or a test was skipped, "failed" (1) else.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from export.format.driver import driver_version
from export.format.tensorrt_library import RTX_CAPABILITIES, Gpu, this_gpu
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
    """Run all parts, even after one has failed, and write the result file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", default="gpu-check")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU")
    options = parser.parse_args()
    try:
        gpu = None if options.dry_run else this_gpu()
    except UnavailableError as error:
        print(f"error: gpu-check has nothing to check: {error}", file=sys.stderr)
        return error.exit_code
    out = Path(options.out).resolve()
    for name in (*PRESETS, "sampling", "run", "samples"):  # the files of an earlier check would pass for this
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "result": "failed",
        "hardware": "none (rehearsal)" if gpu is None else gpu.name,
        "driver_cuda": driver_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "commit": _run(["git", "rev-parse", "HEAD"]),
        "packages": _run([sys.executable, "-m", "pip", "freeze"]).splitlines(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "steps": [],
    }
    steps: list[Step] = report["steps"]
    for each in parts(out, gpu):
        steps.append(each)
        report["result"] = verdict(steps)
        (out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    for each in steps:
        print(f"{each['result']:10}  {each['step']}  ({each['seconds']:.0f} s)")
        for reason in each.get("missing", []):
            print(f"            {reason}")
    print(f"{report['result']}: wrote {out / 'gpu_check.json'}")
    return {"passed": 0, "failed": 1, "incomplete": UnavailableError.exit_code}[str(report["result"])]


def parts(out: Path, gpu: Gpu | None) -> Iterator[Step]:
    """Run one part after another, and yield the result of each; without a GPU all but the tests and the engines."""
    python, dry = sys.executable, gpu is None
    if gpu is not None:
        # One process for each TensorRT, because their Python modules cannot share one.
        yield tests(out, "tests", "not tensorrt-rtx")
    measured = out / "gpu_training.json"
    command = [python, "benchmarks/gpu_training.py", str(measured), *(["--dry-run"] if dry else [])]
    yield with_result(step("training update", command, limit=300), measured)
    yield from sampling(out / "sampling", dry)
    model = str(out / "sampling" / "model.onnx")
    count = ["--count", "512" if dry else "200000", "--format", "jpg", "--out", str(out / "samples")]
    yield step("generation", [python, "-m", "deploy.generate", "--model", model, *count], limit=90)
    yield step("training run", training(out, dry), limit=240, may_be_cut=True)
    if gpu is not None:
        if gpu.compute_capability in RTX_CAPABILITIES:
            yield tests(out, "tests of TensorRT-RTX", "tensorrt-rtx")
        for preset in PRESETS:
            yield from check_preset(out / preset, preset)


def sampling(folder: Path, dry: bool) -> Iterator[Step]:
    """Export the tutorial's generator as ONNX, and measure it by all that needs no engine."""
    export = [sys.executable, "-m", "export.cli"]
    folder.mkdir()
    weights = str(folder / "generator.safetensors")
    yield step("sampling weights", [sys.executable, "-c", PRESET_WEIGHTS, "demo" if dry else "tutorial64", weights])
    yield step("sampling onnx", [*export, "onnx", "--ckpt", weights, "--out", str(folder)], limit=120)
    bench = [*export, "bench", "--ckpt", weights, "--model", str(folder / "model.onnx"), "--out", str(folder / "bench")]
    yield with_result(step("sampling", [*bench, "--quick"], limit=150), folder / "bench" / "bench.json")


def with_result(result: Step, file: Path) -> Step:
    """Return a step with the content of the JSON that it wrote."""
    return {**result, "measured": json.loads(file.read_text()) if file.exists() else None}


def check_preset(folder: Path, preset: str) -> Iterator[Step]:
    """Export a preset's generator, build its engines, and measure all of them."""
    export = [sys.executable, "-m", "export.cli"]
    folder.mkdir()
    weights = str(folder / "generator.safetensors")
    yield step(f"{preset} weights", [sys.executable, "-c", PRESET_WEIGHTS, preset, weights])
    yield step(f"{preset} onnx", [*export, "onnx", "--ckpt", weights, "--out", str(folder)])
    for precision in ("fp32", "tf32", "fp16"):
        options = ["--precision", precision, "--name", f"engine_{precision}.plan"]
        trt = [*export, "trt", "--ckpt", weights, "--out", str(folder), *options]
        yield step(f"{preset} trt {precision}", trt)
    bench = [*export, "bench", "--ckpt", weights, "--out", str(folder / "bench")]
    for model in (folder / "model.onnx", *sorted(folder.glob("*.plan"))):
        bench += ["--model", str(model)]
    yield with_result(step(f"{preset} bench", bench), folder / "bench" / "bench.json")


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


def training(out: Path, dry: bool) -> list[str]:
    """Return the command that trains on the bundled faces in bf16: on a GPU 4 million images, or as far as it gets."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no" if dry else "bf16", "--dynamo_backend", "no"]
    run = ["pipeline/train.py", "--data", "data/faces", "--out", str(out / "run"), "--preset"]
    full = ["tutorial64", "recipe.batch=128", "schedule.total_images=4000000", "schedule.log_every_images=64000"]
    tiny = ["demo", "network.width=4", "schedule.total_images=1280", "schedule.evaluate_samples=64"]
    return [*launch, *run, *(tiny if dry else full)]


def step(name: str, command: list[str], *, limit: float = 180, may_be_cut: bool = False) -> Step:
    """Run one step for at most `limit` seconds, print its output, and return its result and its last 40 lines.

    At the limit it gets SIGTERM, and has then failed, unless it `may_be_cut`, as a trainer that saves.
    """
    print(f"\n== {name}: {' '.join(command)[:300]}", flush=True)
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    cut = threading.Event()

    def stop() -> None:
        cut.set()
        os.killpg(process.pid, signal.SIGTERM)

    timers = [threading.Timer(limit, stop), threading.Timer(limit + 30, os.killpg, (process.pid, signal.SIGKILL))]
    lines = []
    for timer in timers:
        timer.start()
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    code = process.wait()
    for timer in timers:
        timer.cancel()
    result = {0: "passed", UnavailableError.exit_code: "incomplete"}.get(code, "failed")
    if cut.is_set():
        lines.append(f"stopped after its {limit:g} s")
        result = "passed" if may_be_cut else "failed"
    seconds = time.monotonic() - began
    return {"step": name, "result": result, "exit_code": code, "seconds": seconds, "output": lines[-40:]}


def _run(command: list[str]) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
