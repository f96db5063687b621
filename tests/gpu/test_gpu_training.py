"""Training on an NVIDIA GPU: every precision and lever, no host sync in a step, two ranks on one GPU over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import TINY, write_dataset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SCHEDULE = (
    "schedule.total_images=512",
    "schedule.log_every_images=64",
    "schedule.checkpoint_every_images=128",
    "schedule.evaluate_samples=64",
)


def launch(data: Path, out: Path, *overrides: str, precision: str = "no", processes: int = 1) -> list[dict[str, float]]:
    """Train under accelerate launch and return metrics.jsonl."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_machines", "1"]
    command += ["--mixed_precision", precision, "--dynamo_backend", "no", "--num_processes", str(processes)]
    command += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
    script = str(Path(__file__).resolve().parents[2] / "pipeline" / "train.py")
    done = subprocess.run(
        [*command, script, "--data", str(data), "--out", str(out), *TINY, *SCHEDULE, *overrides],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("gpu") / "shards")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("levers", ["", "runtime.compile=true"])
def test_every_precision_trains_and_resumes(data: Path, tmp_path: Path, precision: str, levers: str) -> None:
    overrides = [levers] if levers else []
    lines = launch(data, tmp_path / "run", *overrides, precision=precision)
    assert all(np.isfinite(line["loss_d"]) for line in lines if "loss_d" in line)
    longer = launch(data, tmp_path / "run", *overrides, "schedule.total_images=768", precision=precision)
    assert longer[: len(lines)] == lines
    state = json.loads((tmp_path / "run" / "checkpoints" / f"{768:012d}" / "state.json").read_text())
    assert (state["precision"], state["device"]) == (precision, "cuda")


def test_losses_agree_with_the_cpu(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = launch(data, tmp_path / "gpu", "schedule.total_images=64")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    on_cpu = launch(data, tmp_path / "cpu", "schedule.total_images=64")
    assert on_gpu[0]["loss_d"] == pytest.approx(on_cpu[0]["loss_d"], rel=2e-3)
    assert on_gpu[0]["grad_norm_d"] == pytest.approx(on_cpu[0]["grad_norm_d"], rel=2e-2)


def test_no_host_sync_inside_a_step() -> None:
    from accelerate import Accelerator

    from pipeline.config import load_config
    from pipeline.step import AdversarialStep

    config = load_config(overrides=list(TINY))
    step = AdversarialStep(config, Accelerator())
    reals = torch.zeros(16, 32, 32, 3, dtype=torch.uint8).pin_memory().numpy()
    z = np.zeros((16, 8), np.float32)
    step(reals, z, 16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(reals, z, 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_ranks_share_a_gpu_over_gloo(data: Path, tmp_path: Path) -> None:
    """NCCL refuses two ranks on one GPU; gloo does not, and shows that nothing but NCCL is assumed."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys, pathlib, datetime\n"
        "import torch\n"
        "from accelerate import InitProcessGroupKwargs\n"
        "import pipeline.loop as loop\n"
        "from accelerate import Accelerator, DistributedDataParallelKwargs\n"
        "from pipeline.config import load_config\n"
        "torch.cuda.set_device(0)\n"
        "loop.make_accelerator = lambda: Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend='gloo'),\n"
        "    DistributedDataParallelKwargs(broadcast_buffers=False)])\n"
        "loop.train(load_config(overrides=sys.argv[3:]), data=sys.argv[1], out=pathlib.Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    environment = {**os.environ, "ACCELERATE_TORCH_DEVICE": "cuda:0"}
    done = subprocess.run(
        [*command, str(data), str(tmp_path / "run"), *TINY, *SCHEDULE],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "run" / "checkpoints" / f"{512:012d}" / "state.json").read_text())
    assert state["world_size"] == 2
