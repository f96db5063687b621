"""Runs that are killed, run out of disk or are damaged must end with the same bytes as an undisturbed run."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from storage_servers import FaultyProxy
from support import train_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1100)]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
SCHEDULE = (
    "schedule.total_images=3200",
    "schedule.log_every_images=64",
    "schedule.grid_every_images=800",
    "schedule.checkpoint_every_images=160",
    "schedule.evaluate_every_images=800",
    "schedule.evaluate_samples=64",
    "schedule.keep_checkpoints=2",
)
LAST = "000000003200"
KILLS = 20


def start(data: Path, out: Path, *options: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        train_command(data, out, *SCHEDULE, options=options),
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(data: Path, out: Path, *options: str, **environment: str) -> str:
    """Train to the end and return what was said."""
    process = start(data, out, *options, **environment)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said
    return said


def hashes(out: Path, name: str = LAST) -> dict[str, str]:
    """Return the SHA-256 of every file of a checkpoint, metrics.jsonl so far among them."""
    files: dict[str, str] = json.loads((out / "checkpoints" / name / "state.json").read_text())["files"]
    return files


def checkpoints(out: Path) -> list[str]:
    return sorted(path.parent.name for path in out.glob("checkpoints/*/state.json"))


@pytest.fixture(scope="module")
def undisturbed(faces32: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Return a run that nobody disturbed, and the seconds that it took."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    began = time.monotonic()
    finish(faces32, out)
    return out, time.monotonic() - began


def test_twenty_kills_at_random_instants(faces32: Path, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    whole, _ = undisturbed
    out, chance, killed = tmp_path / "run", random.Random(1), 0
    while killed < KILLS:  # a run that ended just before it was hit does not count
        begun, process = times_begun(out), start(faces32, out)
        lines = chance.choice([None, 0, 0, 1, 2, 3, 5, 8, 13])  # None: while it starts or restores
        if lines is not None:
            wait_until(lambda: times_begun(out), begun + 1, process)
            wait_until(lambda: count_lines(out), count_lines(out) + lines, process)
        time.sleep(chance.uniform(0, 3.0 if lines is None else 0.3))
        process.kill()
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        killed += process.returncode == -signal.SIGKILL
        if (out / "checkpoints" / LAST / "state.json").exists():
            assert hashes(out) == hashes(whole)
            shutil.rmtree(out)  # the next kills meet a new run
    finish(faces32, out)
    assert hashes(out) == hashes(whole)
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def count_lines(out: Path) -> int:
    return (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0


def times_begun(out: Path) -> int:
    text = (out / "log.txt").read_text() if (out / "log.txt").exists() else ""
    return text.count("beginning at image") + text.count("resuming at image")


def test_sigterm_saves_and_the_run_resumes_to_the_same_end(
    faces32: Path, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    whole, seconds = undisturbed
    out, stopped = tmp_path / "run", 0
    for begun in range(1, 5):
        process = start(faces32, out)
        wait_for(lambda: times_begun(out), begun, process)
        time.sleep(0.05 * seconds)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
        assert process.returncode in (0, 143), said
        stopped += process.returncode == 143
    assert stopped >= 2
    finish(faces32, out)
    assert hashes(out) == hashes(whole)


def test_each_file_of_the_latest_checkpoint_damaged(
    faces32: Path, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    whole, _ = undisturbed
    for name in (*hashes(whole), "state.json"):
        out = tmp_path / name
        shutil.copytree(whole, out)
        path = out / "checkpoints" / LAST / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
        said = finish(faces32, out)
        assert "trying the checkpoint before it" in said
        assert LAST in said
        assert hashes(out) == hashes(whole), f"after damage to {name}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root and CAP_SYS_ADMIN")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_with_one_line_and_room_lets_it_go_on(
    faces32: Path, undisturbed: tuple[Path, float], small_disk: Path
) -> None:
    whole, _ = undisturbed
    out, ballast = small_disk / "run", small_disk / "ballast"
    process = start(faces32, out)
    wait_for(lambda: len(checkpoints(out)), 2, process)
    with ballast.open("wb", buffering=0) as file, suppress(OSError):  # somebody fills the disk in the middle of it
        while True:
            file.write(b"\0" * 4096)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 75, said
    assert said.strip().splitlines()[-1].startswith("error: ")
    assert "space" in said.strip().splitlines()[-1]
    assert "Traceback" not in said
    assert checkpoints(out), "what was saved before is still there"
    ballast.unlink()
    finish(faces32, out)
    assert hashes(out) == hashes(whole)


def test_a_run_moves_to_an_empty_disk_through_a_failing_mirror(
    faces32: Path, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    moto_server = pytest.importorskip("moto.server", reason="moto is in the extra dev")
    whole, _ = undisturbed
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = FaultyProxy(server.get_host_and_port()[1])
    access = {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        import boto3

        boto3.client("s3", endpoint_url=proxy.url, **_boto(access)).create_bucket(Bucket="mirror")
        proxy.only, proxy.faults = "mirror", [None, 503, "reset", None, "cut", None, None, None] * 3
        out = tmp_path / "run"
        process = start(faces32, out, "--mirror", "s3://mirror/run", **access)
        wait_for(lambda: len(checkpoints(out)), 2, process)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=200)[1]
        assert process.returncode == 143, said
        shutil.rmtree(out)  # the node is gone
        said = finish(faces32, out, "--mirror", "s3://mirror/run", **access)
        assert "brought back checkpoint" in said
        assert hashes(out) == hashes(whole)
    finally:
        proxy.stop()
        server.stop()


def _boto(access: dict[str, str]) -> dict[str, str]:
    return {
        "aws_access_key_id": access["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": access["AWS_SECRET_ACCESS_KEY"],
        "region_name": access["AWS_DEFAULT_REGION"],
    }


def wait_until(count: Callable[[], int], least: int, process: "subprocess.Popen[str]") -> None:
    """Return when `count()` has reached `least`, or the process has ended."""
    while count() < least and process.poll() is None:
        time.sleep(0.01)


def wait_for(count: Callable[[], int], least: int, process: "subprocess.Popen[str]") -> None:
    """Return when `count()` has reached `least`; fail when the process ends before that."""
    wait_until(count, least, process)
    assert count() >= least, process.communicate()[1]
