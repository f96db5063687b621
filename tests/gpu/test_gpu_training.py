"""Training on an NVIDIA GPU: every precision and option, no host sync in a step, two ranks on one GPU over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import TINY, write_dataset

from pipeline.training.accelerator import pci_address

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SCHEDULE = (
    "schedule.total_images=512",
    "schedule.log_every_images=64",
    "schedule.checkpoint_every_images=128",
    "schedule.evaluate_samples=64",
)


def test_a_gpu_is_where_pytorch_says() -> None:
    """Else ranks would not find the NUMA node of theirs, in silence."""
    assert (Path("/sys/bus/pci/devices") / pci_address(torch.device("cuda", 0)) / "numa_node").exists()


def launch(data: Path, out: Path, *overrides: str, precision: str = "no", cpu: bool = False) -> list[dict[str, float]]:
    """Train under accelerate launch and return metrics.jsonl."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_machines", "1"]
    command += ["--mixed_precision", precision, "--dynamo_backend", "no", "--num_processes", "1"]
    command += ["--cpu"] * cpu
    script = str(Path(__file__).resolve().parents[2] / "pipeline" / "train.py")
    done = subprocess.run(
        [*command, script, "--data", str(data), "--out", str(out), *TINY, *SCHEDULE, *overrides],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    state = json.loads(max((out / "checkpoints").glob("*/state.json")).read_text())
    assert (state["precision"], state["device"]) == (precision, "cpu" if cpu else "cuda")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("gpu") / "shards")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("override", ["", "runtime.compile=true"])
def test_every_precision_trains_and_resumes(data: Path, tmp_path: Path, precision: str, override: str) -> None:
    overrides = [override] if override else []
    lines = launch(data, tmp_path / "run", *overrides, precision=precision)
    assert all(np.isfinite(line["loss_d"]) for line in lines if "loss_d" in line)
    longer = launch(data, tmp_path / "run", *overrides, "schedule.total_images=768", precision=precision)
    assert longer[: len(lines)] == lines


def test_losses_agree_with_the_cpu(data: Path, tmp_path: Path) -> None:
    """To what TF32 convolutions leave of it after four updates."""
    on_gpu = launch(data, tmp_path / "gpu", "schedule.total_images=64")
    on_cpu = launch(data, tmp_path / "cpu", "schedule.total_images=64", cpu=True)
    assert on_gpu[0]["loss_d"] == pytest.approx(on_cpu[0]["loss_d"], rel=2e-2)
    assert on_gpu[0]["grad_norm_d"] == pytest.approx(on_cpu[0]["grad_norm_d"], rel=5e-2)


def test_a_batch_on_its_way_to_the_gpu_is_not_overwritten(data: Path) -> None:
    """The stream pins its batches; their memory must not be used again before a copy that the GPU has yet to make."""
    from pipeline.data.dataset import open_dataset
    from pipeline.data.loading.loader import Loader

    with Loader(open_dataset(data), seed=0, streams=8, batch=64) as stream:
        copies, expected = [], []
        torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call] # a second or so, in which the host runs far ahead
        for _ in range(64):
            reals = stream.next_batch()
            expected.append(reals.copy())
            tensor = torch.from_numpy(reals)
            assert tensor.is_pinned()
            copies.append(tensor.to("cuda", non_blocking=True))
            del reals, tensor
        torch.cuda.synchronize()
    for copy, batch in zip(copies, expected, strict=True):
        assert np.array_equal(copy.cpu().numpy(), batch)


def test_batches_from_the_devices_memory_are_those_of_the_stream_and_make_no_host_wait(data: Path) -> None:
    from pipeline.common.ranks import Ranks
    from pipeline.config import load_config
    from pipeline.data.dataset import open_dataset
    from pipeline.data.loading.device_set import DeviceLoader, open_loader
    from pipeline.data.loading.loader import run_loader

    dataset, device = open_dataset(data), torch.device("cuda")
    config = load_config(overrides=["recipe.streams=8", "recipe.batch=64", "runtime.data=auto"])
    with (
        open_loader(config, dataset, device, 128, Ranks()) as there,
        run_loader(config, dataset, start=128, rank=0, world_size=1) as stream,
    ):
        assert isinstance(there, DeviceLoader)
        torch.cuda.set_sync_debug_mode("error")
        try:
            batches = [there.next_batch() for _ in range(300)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(np.array_equal(batch.cpu().numpy(), stream.next_batch()) for batch in batches)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_no_host_sync_inside_a_step(precision: str) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from pipeline.config import load_config
    from pipeline.training.step import AdversarialStep
    from pipeline.training.update.graph import WARM_UP

    AcceleratorState._reset_state(reset_partial_state=True)
    config = load_config(overrides=list(TINY))
    step = AdversarialStep(config, Accelerator(mixed_precision=precision))
    reals = torch.zeros(16, 32, 32, 3, dtype=torch.uint8).pin_memory().numpy()
    z = np.zeros((16, 8), np.float32)
    for _ in range(WARM_UP + 1):  # a graph has been captured then
        step.update(reals, z, 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step.update(reals, z, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_quality_has_the_digits_that_it_has_on_the_cpu() -> None:
    """Whatever precision the training has chosen for its own products."""
    from pipeline.evaluation.metrics.quality import quality

    draw = np.random.default_rng(0)
    reals, fakes = (draw.integers(0, 256, (200, 16, 16, 3), np.uint8).repeat(4, 1).repeat(4, 2) for _ in range(2))
    on_cpu = quality(reals, fakes, seed=1)
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    try:
        on_gpu = quality(reals, fakes, seed=1, device="cuda")
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


def test_a_copy_in_host_memory_is_whole_when_it_is_there() -> None:
    from pipeline.checkpoints.saver import HostMemory

    weight, memory = torch.zeros(64, 1 << 20, device="cuda"), HostMemory()
    for value in (1.0, 2.0):
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call] # the host runs ahead of the update
        weight.fill_(value)
        copy = memory.copy({"weight": weight})["weight"]
        assert copy.is_pinned()
        assert copy.eq(value).all()


@pytest.mark.parametrize("override", ["", "recipe.sync_batchnorm=true"])
def test_two_ranks_share_a_gpu_over_gloo(data: Path, tmp_path: Path, override: str) -> None:
    """NCCL refuses two ranks on one GPU; gloo does not, and shows that nothing but NCCL is assumed."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, sys, pathlib\n"
        "os.environ['LOCAL_RANK'] = '0'  # the GPU that accelerate and DDP take\n"
        "import torch\n"
        "from accelerate import InitProcessGroupKwargs\n"
        "import pipeline.training.loop as loop\n"
        "from accelerate import Accelerator\n"
        "from pipeline.config import load_config\n"
        "torch.cuda.set_device(0)\n"
        "loop.make_accelerator = lambda: Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend='gloo')])\n"
        "loop.train(load_config(overrides=sys.argv[3:]), data=sys.argv[1], out=pathlib.Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    done = subprocess.run(
        [*command, str(data), str(tmp_path / "run"), *TINY, *SCHEDULE, *[override] * bool(override)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "run" / "checkpoints" / f"{512:012d}" / "state.json").read_text())
    assert state["world_size"] == 2
