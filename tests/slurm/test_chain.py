"""Debian's Slurm, for real: the whole chain as jobs that are stopped, requeued and resumed, to the same bytes.

`make test-slurm`; needs root, and slurmctld, slurmd, slurm-client and munge (`make system-slow`).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import ROOT, TINY

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
BIN = Path(sys.executable).parent
PARTS = 3
COUNT, SHARD_IMAGES = 6_000, 500
SETTINGS = (
    *TINY,
    "schedule.total_images=48000",
    "schedule.checkpoint_every_images=3200",
    "schedule.log_every_images=1600",
    "schedule.evaluate_samples=64",
    "schedule.evaluate_every_images=16000",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        os.geteuid() != 0 or any(shutil.which(name, path="/usr/sbin:/usr/bin") is None for name in PROGRAMS),
        reason="needs root, and slurmctld, slurmd, slurm-client and munge (`make system-slow` installs them)",
    ),
]


class Cluster:
    """Commands of Slurm, and jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "ACCELERATE_USE_CPU": "true"}
        self.environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(self, *command: object) -> str:
        done = self._run(command)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def say(self, *command: object) -> str:
        """Return what a command prints, also when it fails."""
        return self._run(command).stdout

    def _run(self, command: tuple[object, ...]) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        place: dict[str, Any] = {"cwd": self.folder, "env": self.environment}
        return subprocess.run(words, **place, capture_output=True, text=True, check=False)

    def job(self, number: str) -> dict[str, str]:
        """Return the fields of a job, of the first task of an array."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number).split("\n\n")[0]))

    def wait(self, what: str, true: Callable[[], bool], seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"no {what}\n{self.run('squeue')}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()}" for log in sorted(self.folder.glob("dcgan-*.log")))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "slurm"
    folder.mkdir()
    command = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh"]
    process = subprocess.Popen([*command, str(Path(__file__).with_name("cluster.sh")), str(folder)])
    found = Cluster(folder)
    try:
        deadline = time.monotonic() + 60
        while "idle n[01-02]" not in found.say("sinfo", "--format=%T %N"):
            assert process.poll() is None
            assert time.monotonic() < deadline, [log.read_text()[-2000:] for log in folder.glob("*.log")]
            time.sleep(0.5)
        yield found
    finally:
        process.kill()
        process.wait()


def write_pictures(folder: Path) -> Path:
    folder.mkdir()
    random = np.random.Generator(np.random.Philox(1))
    for number in range(300):
        pixels = random.integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


def undisturbed(folder: Path, pictures: Path) -> None:
    """Make what the jobs make, on this machine alone."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    model = ("--model", folder / "model/model.onnx")
    for program, *arguments in (
        ("dcgan-data", "build", "folder", pictures, folder / "data", "--size", 32, "--encoding", "packed"),
        (
            "dcgan-launch",
            "--processes",
            2,
            "train",
            "--data",
            folder / "data",
            "--out",
            folder / "run",
            "--preset",
            "tutorial64",
            *SETTINGS,
        ),
        ("dcgan-export", "onnx", "--ckpt", folder / "run", "--out", folder / "model"),
        ("dcgan-generate", *model, "--count", COUNT, "--shard-images", SHARD_IMAGES, "--out", folder / "samples"),
        ("dcgan-generate", "merge", folder / "samples"),
    ):
        command = [str(BIN / program), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def shards(folder: Path) -> list[tuple[str, str]]:
    found: list[dict[str, Any]] = json.loads((folder / "dataset.json").read_text())["shards"]
    return [(shard["name"], shard["sha256"]) for shard in found]


def newest(run: Path) -> Path:
    return sorted(run.glob("checkpoints/*/state.json"))[-1]


def test_jobs_that_are_stopped_and_requeued_make_the_same_bytes(cluster: Cluster, tmp_path: Path) -> None:
    pictures, out = write_pictures(tmp_path / "pictures"), tmp_path / "out"
    settings = (ROOT / "deploy/slurm/settings.sh").read_text()
    for name, value in {
        "PATH": f"{BIN}:$PATH",
        "SOURCE": pictures,
        "SIZE": 32,
        "DATA": out / "data",
        "DATA_PARTS": 2,
        "RUN": out / "run",
        "TRAIN_SETTINGS": f'"{" ".join(SETTINGS)}"',
        "MODEL": out / "model",
        "COUNT": COUNT,
        "SHARD_IMAGES": SHARD_IMAGES,
        "SAMPLES": out / "samples",
        "PARTS": PARTS,
    }.items():
        settings, count = re.subn(rf"^{name}=.*$", f"{name}={value}", settings, flags=re.MULTILINE)
        assert count == 1, name
    (tmp_path / "mine.sh").write_text(settings)
    said = cluster.run(ROOT / "deploy/slurm/submit.sh", tmp_path / "mine.sh")
    jobs = dict(re.findall(r"(\S+): job (\d+)", said))
    assert list(jobs) == ["data", "data-merge", "train", "export", "generate", "generate-merge"]

    def saved(more_than: int) -> Callable[[], bool]:
        return lambda: any(int(file.parent.name) > more_than for file in out.glob("run/checkpoints/*/state.json"))

    # As before the time limit: SIGTERM to the program, not to the script. It saves, and its job is requeued.
    cluster.wait("training", saved(3_000))
    cluster.run("scancel", "--signal=TERM", jobs["train"])
    cluster.wait("requeue", lambda: cluster.job(jobs["train"])["Restarts"] == "1")
    stopped_at = int(newest(out / "run").parent.name)
    # As a preemption does, and an administrator.
    cluster.wait("resumed training", saved(stopped_at))
    cluster.run("scontrol", "requeue", jobs["train"])
    cluster.wait("another requeue", lambda: cluster.job(jobs["train"])["Restarts"] == "2")
    cluster.wait("samples", lambda: any(out.glob("samples/*.tar")))
    cluster.run("scontrol", "requeue", f"{jobs['generate']}_0")
    cluster.wait("end", lambda: cluster.job(jobs["generate-merge"])["JobState"] not in ("PENDING", "RUNNING"))
    log = cluster.logs()
    print(log)
    assert cluster.job(jobs["generate-merge"])["JobState"] == "COMPLETED", log
    trained = next(cluster.folder.glob("dcgan-train-*.log")).read_text()
    assert trained.count("dcgan-launch: machine 0 of 2, 1 processes each, rank 0 at n01:") == 3
    assert "exit code 143: requeued" in trained
    assert trained.count("resuming at image") == 2
    assert json.loads(newest(out / "run").read_text())["world_size"] == 2

    undisturbed(tmp_path / "alone", pictures)
    assert shards(out / "data") == shards(tmp_path / "alone/data")
    ours, theirs = newest(out / "run").parent, newest(tmp_path / "alone/run").parent
    assert ours.name == theirs.name
    for name in ("generator.safetensors", "generator_ema.safetensors", "discriminator.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert (out / "model/model.onnx").read_bytes() == (tmp_path / "alone/model/model.onnx").read_bytes()
    assert shards(out / "samples") == shards(tmp_path / "alone/samples")


def test_a_job_that_somebody_cancels_does_not_come_again(cluster: Cluster) -> None:
    script = cluster.folder / "job.sbatch"
    common = ROOT / "deploy/slurm/common.sh"
    script.write_text(
        f"#!/bin/sh\n#SBATCH --requeue\n#SBATCH --nodes=2\n. {common}\nstep sh -c 'touch here; sleep 60'\n"
    )
    job = cluster.run("sbatch", "--parsable", script).strip()
    cluster.wait("start", (cluster.folder / "here").exists)
    cluster.run("scancel", job)
    cluster.wait("end", lambda: cluster.job(job)["JobState"] == "CANCELLED")
    assert cluster.job(job)["Restarts"] == "0"


@pytest.mark.parametrize(("code", "restarts", "state"), [(65, 0, "FAILED"), (75, 2, "FAILED"), (0, 0, "COMPLETED")])
def test_a_code_decides_whether_a_job_comes_again(cluster: Cluster, code: int, restarts: int, state: str) -> None:
    script = cluster.folder / "job.sbatch"
    common = ROOT / "deploy/slurm/common.sh"
    script.write_text(f"#!/bin/sh\n#SBATCH --requeue\nDCGAN_RESTARTS=2\n. {common}\nstep sh -c 'exit {code}'\n")
    job = cluster.run("sbatch", "--parsable", script).strip()
    cluster.wait("end", lambda: cluster.job(job)["JobState"] in ("FAILED", "COMPLETED"))
    found = cluster.job(job)
    assert (found["JobState"], found["Restarts"], found["ExitCode"]) == (state, str(restarts), f"{code}:0")
