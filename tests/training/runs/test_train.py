"""Training as a user starts it: what a run leaves, launchers, locks, refusals, bad input, precisions."""

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from support import Trainer, train_command, write_dataset
from training_cases import ENVIRONMENT, SCHEDULE, hashes, wait_for_lines

from pipeline.checkpoints.store import CheckpointStore
from pipeline.common.storage import Store


def test_a_run_leaves_what_people_look_for(whole_run: Path) -> None:
    grids = sorted(path.name for path in (whole_run / "samples").iterdir())
    assert grids == ["000000000.png", "000000128.png", "000000256.png"]
    assert Image.open(whole_run / "samples" / grids[-1]).size == (8 * 32, 8 * 32)
    assert json.loads((whole_run / "config.json").read_text())["config"]["recipe"]["batch"] == 16
    lines = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines if "loss_d" in line] == list(range(32, 257, 32))
    assert [line["images"] for line in lines if "swd" in line] == [128, 256]
    assert list((whole_run / "tensorboard").iterdir())
    assert "resuming" not in (whole_run / "log.txt").read_text()
    timing = [json.loads(line) for line in (whole_run / "timing.jsonl").read_text().splitlines()]
    assert [line["images"] for line in timing if "images_per_second" in line] == list(range(32, 257, 32))
    assert [line["images"] for line in timing if "grid_seconds" in line] == [0, 128, 256]
    assert [line["images"] for line in timing if "evaluate_seconds" in line] == [128, 256]
    assert [line["images"] for line in timing if "checkpoint_seconds" in line] == [64, 128, 192, 256]


def test_accelerate_launch_does_not_leave_its_trainer_behind(faces32: Path, tmp_path: Path) -> None:
    """The launcher ends at SIGTERM without a word to its child, which then saves and ends as well."""
    out = tmp_path / "run"
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--quiet", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    settings = (*SCHEDULE, "schedule.total_images=1000000", "schedule.checkpoint_every_images=1000000")
    command = [*launch, *train_command(faces32, out, *settings, "schedule.evaluate_every_images=1000000")[1:]]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    try:
        wait_for_lines(out, 1)
        (trainer,) = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert psutil.wait_procs([trainer], timeout=60)[1] == []
    finally:
        process.kill()
    assert len(list(out.glob("checkpoints/*/state.json"))) == 1


def test_metrics_are_served_while_it_trains(faces32: Path, tmp_path: Path) -> None:
    command = train_command(
        faces32, tmp_path / "run", *SCHEDULE, "schedule.total_images=8192", options=["--metrics-port", "0"]
    )
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("metrics on"))
        wait_for_lines(tmp_path / "run", 2)
        text = urllib.request.urlopen(line.split()[-1], timeout=30).read().decode()
    finally:
        process.terminate()
        process.communicate()
    assert "dcgan_train_images_total" in text
    assert "dcgan_train_loss" in text


def test_a_second_trainer_is_kept_out(
    started: tuple[subprocess.Popen[str], Path], faces32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, out = started
    wait_for_lines(out, 1)
    process.send_signal(signal.SIGSTOP)
    from pipeline.common.errors import TryAgainError
    from pipeline.training import run_directory

    monkeypatch.setattr(run_directory, "LOCK_PATIENCE_SECONDS", 0.0)
    with pytest.raises(TryAgainError, match=f"process {process.pid} .* is training this run"):
        run_directory.RunDirectory(out)
    process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    ("data", "overrides", "code", "words"),
    [
        ("missing", [], 65, ["missing", "dataset.json"]),
        ("ok", ["network.image_size=64"], 78, ["image_size 32", "network.image_size=32"]),
        ("ok", ["network.channels=1"], 78, ["network.channels=3"]),
        ("ok", ["recipe.bach=3"], 2, ["recipe.batch"]),
        ("lying", [], 65, ["dataset.json", "200", "201"]),
        ("cut", [], 65, [".tar"]),
    ],
)
def test_bad_input_is_one_line_and_the_right_code(
    faces32: Path, tmp_path: Path, trainer: Trainer, data: str, overrides: list[str], code: int, words: list[str]
) -> None:
    import shutil

    folder = tmp_path / data
    if data != "missing":
        shutil.copytree(faces32, folder)
    if data == "lying":
        file = folder / "dataset.json"
        file.write_text(file.read_text().replace('"images":200', '"images":201'))
    if data == "cut":
        for shard in folder.glob("*.tar"):
            shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    done = trainer(folder, tmp_path / "run", *SCHEDULE, *overrides)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert all(word in last for word in words), last


def test_divergence_stops_the_run_and_names_the_last_good_checkpoint(
    whole_run: Path, faces32: Path, trainer: Trainer, tmp_path: Path
) -> None:
    import shutil

    out = tmp_path / "copy"
    shutil.copytree(whole_run, out)
    overrides = ["schedule.total_images=512", "recipe.learning_rate_g=1e30", "recipe.learning_rate_d=1e30"]
    allow = ["--allow-change", "recipe.learning_rate_g,recipe.learning_rate_d"]
    done = trainer(faces32, out, *SCHEDULE, *overrides, options=allow)
    assert done.returncode == 65, done.stderr
    assert "checkpoints/000000000256" in done.stderr.strip().splitlines()[-1]
    assert "learning_rate" in done.stderr


def test_a_taken_port_is_named(faces32: Path, tmp_path: Path, trainer: Trainer) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = trainer(faces32, tmp_path / "run", *SCHEDULE, options=["--metrics-port", str(port)])
    assert done.returncode == 2
    assert f"--metrics-port {port}" in done.stderr.strip().splitlines()[-1]


def test_bf16_on_the_cpu(faces32: Path, tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    done = trainer(faces32, tmp_path / "run", "schedule.total_images=64", "schedule.evaluate_samples=64")
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "run" / "checkpoints" / "000000000064" / "state.json").read_text())
    assert state["precision"] == "bf16"


def test_fp16_on_the_cpu_is_refused(
    faces32: Path, tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate trains in float32 then, and calls it fp16."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    done = trainer(faces32, tmp_path / "run", "schedule.total_images=64")
    assert done.returncode == 69
    assert "--mixed_precision fp16" in done.stderr.strip().splitlines()[-1]


def test_an_extractor_adds_fid_and_kid_and_may_choose_the_best(faces32: Path, tmp_path: Path, trainer: Trainer) -> None:
    settings = [*SCHEDULE, "schedule.extractor=fallback", "schedule.best_metric=fid", "schedule.keep_checkpoints=1"]
    done = trainer(faces32, tmp_path / "run", *settings)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {line["images"]: line["fid"] for line in lines if "fid" in line}
    assert set(found) == {128, 256}
    assert all("kid_x1000" in line and "swd" in line for line in lines if "fid" in line)
    assert f"{min(found, key=found.__getitem__):012d}" == CheckpointStore(Store(tmp_path / "run")).best()


def test_a_missing_extractor_is_told_before_the_first_step(faces32: Path, tmp_path: Path, trainer: Trainer) -> None:
    done = trainer(faces32, tmp_path / "run", *SCHEDULE, f"schedule.extractor={tmp_path}/inception.pt")
    assert done.returncode == 65
    assert "inception.pt" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run" / "samples").exists()


def test_a_data_set_in_the_devices_memory_gives_the_same_run(
    whole_run: Path, faces32: Path, tmp_path: Path, trainer: Trainer
) -> None:
    done = trainer(faces32, tmp_path / "run", *SCHEDULE, "runtime.data=device")
    assert done.returncode == 0, done.stderr
    assert "of them in the memory of cpu" in done.stderr
    assert hashes(tmp_path / "run", 256) == hashes(whole_run, 256)


def test_gray_and_encoded_shards_train_too(tmp_path: Path, trainer: Trainer) -> None:
    data = write_dataset(tmp_path / "gray", images=64, channels=1, encoding="jpg")
    done = trainer(
        data, tmp_path / "run", "network.channels=1", "schedule.total_images=32", "schedule.evaluate_samples=64"
    )
    assert done.returncode == 0, done.stderr
    grid = np.asarray(Image.open(tmp_path / "run" / "samples" / "000000032.png"))
    assert grid.shape[:2] == (256, 256)
