"""Pictures to samples over a store that fails, by programs that are killed: every hash is that of a quiet day."""

import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_start
from faulty_store import KINDS, FaultyStore
from picture_files import make_picture
from safetensors.torch import load_file
from storage_servers import s3_server
from support import train_command

from pipeline.common.imaging import encode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SEED = 16
SHARE = 0.05
PICTURES = 240
SCHEDULE = (
    "schedule.total_images=960",
    "schedule.log_every_images=32",
    "schedule.grid_every_images=480",
    "schedule.checkpoint_every_images=160",
    "schedule.evaluate_every_images=480",
    "schedule.evaluate_samples=64",
    "schedule.keep_checkpoints=2",
)
LAST = f"{960:012d}"
SAMPLES = ("--count", "470", "--shard-images", "32", "--backend", "onnxruntime", "--threads", "1", "--encoders", "1")
DATA, EXPORT, GENERATE = "pipeline.data.cli", "export.cli", "deploy.generate"
AGAIN = (75, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL)
"""Codes after which an orchestrator starts a program again."""

STARTING = threading.Lock()
"""One program at a time is started."""

Programs = list[warm_start.Popen]


@dataclass
class Place:
    """A folder of the bucket and one on the disk, the store's address, and what all programs there said."""

    bucket: str
    disk: Path
    environment: dict[str, str]

    @property
    def log(self) -> Path:
        return self.disk / "log"

    def said(self) -> str:
        return self.log.read_text()

    def start(self, module: str, *arguments: object) -> Programs:
        """Start one of our commands."""
        command = [sys.executable, "-c", f"from {module} import main; main()", *arguments]
        with self.log.open("a") as log, STARTING:
            return [warm_start.Popen(command, env=self.environment, stdout=log, stderr=log)]

    def start_training(self, run: str) -> Programs:
        """Start two ranks that train in the folder `run` of the disk, with a cache of their own."""
        command = train_command(
            f"{self.bucket}/data", self.disk / run, *SCHEDULE, options=["--mirror", f"{self.bucket}/mirror"]
        )
        environment = {**self.environment, "DCGAN_CACHE": str(self.disk / f"{run}-cache")}
        with self.log.open("a") as log:
            return warm_start.start_ranks(command, 2, env=environment, output=log)


class Bucket:
    """The bucket as it is, behind the proxy's back."""

    def __init__(self, port: int) -> None:
        import boto3

        self._client: Any = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        self._client.create_bucket(Bucket="bucket")

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket="bucket", Key=key, Body=data, ChecksumAlgorithm="CRC32")

    def files(self, prefix: str) -> dict[str, bytes]:
        """Return all files below `prefix` by their names there."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=f"{prefix}/")
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {
            key.removeprefix(f"{prefix}/"): self._client.get_object(Bucket="bucket", Key=key)["Body"].read()
            for key in keys
        }


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Bucket, int]]:
    """Return an S3 bucket with pictures, and the port of its server."""
    for key, value in {
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    with s3_server(tmp_path / "s3.log") as port:
        bucket = Bucket(port)
        for index in range(PICTURES):
            bucket.put(f"pictures/{'ab'[index % 2]}/{index:04d}.png", encode(make_picture(index), "png"))
        yield bucket, port


def make_place(name: str, disk: Path, url: str, credentials: Path) -> Place:
    disk.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    environment |= {
        "AWS_ENDPOINT_URL": url,
        "AWS_SHARED_CREDENTIALS_FILE": str(credentials),
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    return Place(f"s3://bucket/{name}", disk, environment)


def wait(programs: Programs, seconds: float = 300) -> list[int]:
    """Wait for programs to end; return their codes."""
    try:
        return [program.wait(seconds) for program in programs]
    finally:
        for program in programs:
            program.kill()


def finish(place: Place, programs: Programs) -> None:
    """Wait for programs that nothing disturbs."""
    assert not any(wait(programs)), place.said()[-6000:]


def build_arguments(place: Place) -> tuple[object, ...]:
    options = ("--size", "32", "--shard-images", "30", "--workers", "1")
    return "build", "folder", "s3://bucket/pictures", f"{place.bucket}/data", *options


def export_arguments(place: Place) -> tuple[object, ...]:
    return "onnx", "--ckpt", f"{place.bucket}/mirror", "--out", place.disk / "model", "--parity-images", 256


class Chaos:
    """Kills programs at moments that follow from the seed, and starts them again until they are done."""

    def __init__(self, place: Place, store: FaultyStore) -> None:
        self.place, self.store = place, store
        self.killed: Counter[str] = Counter()
        self.gave_up = 0

    def hit(self, programs: Programs, number: signal.Signals, moment: Callable[[], bool]) -> None:
        """Send a signal to all programs at a moment. Those that are done before are not hit."""
        while not moment() and all(program.poll() is None for program in programs):
            time.sleep(0.005)
        for program in programs:
            program.send_signal(number)
        codes = self._wait(programs)
        self.killed[number.name] += any(codes) and 75 not in codes

    def finish(self, start: Callable[[], Programs]) -> None:
        """Start a program again until it is done."""
        for _ in range(20):
            codes = self._wait(start())
            if not any(codes):
                return
            self.gave_up += 1
        raise AssertionError(f"not done after 20 starts:\n{self.place.said()[-6000:]}")

    def after_requests(self, count: int) -> Callable[[], bool]:
        """Return whether the store got `count` more requests, when called later."""
        until = self.store.requests + count
        return lambda: self.store.requests >= until

    def kill_and_finish(self, kills: int, requests: int, module: str, *arguments: object) -> None:
        """Run a command, killed `kills` times, each time after at most `requests` requests."""
        dice = random.Random(f"{SEED} {arguments}")
        for _ in range(kills):
            number = dice.choice([signal.SIGKILL, signal.SIGTERM])
            self.hit(self.place.start(module, *arguments), number, self.after_requests(dice.randint(1, requests)))
        self.finish(lambda: self.place.start(module, *arguments))

    def in_parts(self, parts: int, kills: int, requests: int, module: str, *arguments: object) -> None:
        """Run the parts of a command at the same time, each killed."""
        with ThreadPoolExecutor(parts) as pool:
            list(
                pool.map(
                    lambda part: self.kill_and_finish(kills, requests, module, *arguments, "--part", f"{part}/{parts}"),
                    range(parts),
                )
            )

    def _wait(self, programs: Programs) -> list[int]:
        codes = wait(programs)
        assert set(codes) <= {0, *AGAIN}, f"{codes}\n{self.place.said()[-6000:]}"
        return codes


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def train_through(chaos: Chaos, bucket: Bucket) -> Path:
    """Train to the end through kills at random moments, once on a fresh disk; return the run."""
    place, dice, run = chaos.place, random.Random(SEED), "run"

    def after_lines(fewest: int, most: int) -> Callable[[], bool]:
        metrics = place.disk / run / "metrics.jsonl"
        end = lines(metrics) + dice.randint(fewest, most)
        return lambda: lines(metrics) >= end

    def mirrored(name: str) -> bool:
        return any(file.endswith(f"{name}/state.json") for file in bucket.files("storm/mirror"))

    chaos.hit(place.start_training(run), signal.SIGKILL, chaos.after_requests(dice.randint(1, 20)))
    chaos.hit(place.start_training(run), signal.SIGKILL, after_lines(5, 8))
    chaos.hit(place.start_training(run), signal.SIGTERM, after_lines(1, 3))
    chaos.hit(place.start_training(run), signal.SIGKILL, chaos.after_requests(dice.randint(1, 10)))
    while not mirrored(""):  # a run that was asked to stop does not wait long for its mirror
        chaos.hit(place.start_training(run), signal.SIGTERM, after_lines(1, 1))
    run = "fresh"
    chaos.hit(place.start_training(run), signal.SIGKILL, after_lines(2, 4))
    assert "brought back checkpoint" in (place.disk / run / "log.txt").read_text()
    chaos.hit(place.start_training(run), signal.SIGTERM, after_lines(1, 3))
    chaos.finish(lambda: place.start_training(run))
    while not mirrored(LAST):  # the next start makes the copy
        chaos.finish(lambda: place.start_training(run))
    return place.disk / run


def test_every_hash_is_that_of_a_quiet_day(bucket: tuple[Bucket, int], tmp_path: Path) -> None:
    files, port = bucket
    clock = [time.monotonic()]
    credentials = tmp_path / "quiet-credentials"
    credentials.write_text("[default]\naws_access_key_id = key\naws_secret_access_key = secret\n")
    calm = make_place("calm", tmp_path / "calm", f"http://127.0.0.1:{port}", credentials)
    finish(calm, calm.start(DATA, *build_arguments(calm)))
    finish(calm, calm.start_training("run"))
    finish(calm, calm.start(EXPORT, *export_arguments(calm)))
    model = calm.disk / "model" / "model.onnx"
    finish(calm, calm.start(GENERATE, "--model", model, *SAMPLES, "--out", f"{calm.bucket}/samples"))
    finish(calm, calm.start(GENERATE, "merge", f"{calm.bucket}/samples"))
    clock.append(time.monotonic())

    store = FaultyStore(port, tmp_path / "credentials", seed=SEED, share=SHARE, lifetime=150)
    storm = make_place("storm", tmp_path / "storm", store.url, tmp_path / "credentials")
    chaos = Chaos(storm, store)
    chaos.in_parts(2, 1, 150, DATA, *build_arguments(storm))
    chaos.kill_and_finish(2, 12, DATA, "merge", f"{storm.bucket}/data")
    assert digests(files.files("storm/data")) == digests(files.files("calm/data"))
    clock.append(time.monotonic())

    run = train_through(chaos, files)
    whole = calm.disk / "run"
    assert set(hashes(run)) == set(hashes(whole))
    for name, digest in hashes(whole).items():
        if digest != hashes(run)[name]:
            assert_equal_weights(run / "checkpoints" / LAST / name, whole / "checkpoints" / LAST / name)
    grids = [grid.relative_to(run) for grid in run.glob("samples/*")]  # a fresh disk has those that were drawn there
    assert Path("samples") / f"{LAST[3:]}.png" in grids
    for path in (Path("metrics.jsonl"), *grids):
        assert (run / path).read_bytes() == (whole / path).read_bytes(), path
    copy = files.files(f"storm/mirror/checkpoints/{LAST}")
    assert {name: digest for name, digest in digests(copy).items() if name != "state.json"} == hashes(run)
    clock.append(time.monotonic())

    chaos.kill_and_finish(2, 6, EXPORT, *export_arguments(storm))
    exported = storm.disk / "model" / "model.onnx"
    assert exported.read_bytes() == model.read_bytes()
    chaos.kill_and_finish(1, 2, EXPORT, "publish", "--model", exported, "--to", f"{storm.bucket}/model")
    assert files.files("storm/model")["model.onnx"] == model.read_bytes()
    clock.append(time.monotonic())

    generate = ("--model", f"{storm.bucket}/model/model.onnx", *SAMPLES, "--out", f"{storm.bucket}/samples")
    chaos.in_parts(3, 2, 40, GENERATE, *generate)
    chaos.kill_and_finish(1, 10, GENERATE, "merge", f"{storm.bucket}/samples")
    assert digests(files.files("storm/samples")) == digests(files.files("calm/samples"))
    clock.append(time.monotonic())
    store.close()

    retries = storm.said().count("; retrying in ")
    seconds = [round(after - before) for before, after in zip(clock, clock[1:], strict=False)]
    print(f"{seconds} s; {store.requests} requests, {retries} retries, {dict(chaos.killed)}, {chaos.gave_up} gave up")
    print(json.dumps(store.injected, indent=1))
    assert set(store.injected) == KINDS
    assert retries > store.injected.total() / 3  # what kills cut off, and what a merge read before, is not told
    assert min(chaos.killed[name] for name in ("SIGKILL", "SIGTERM")) >= 2
    assert "Traceback" not in storm.said()


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def hashes(run: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of the last checkpoint, as its state.json tells them."""
    files: dict[str, str] = json.loads((run / "checkpoints" / LAST / "state.json").read_text())["files"]
    return files


def assert_equal_weights(one: Path, other: Path) -> None:
    """Check that networks differ at most in BatchNorm's running statistics, which every save averages over the ranks.

    A stop saves where the quiet run does not, and so rounds them once more.
    """
    assert one.name in ("generator.safetensors", "discriminator.safetensors"), f"{one} differs"
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-7)
        else:
            assert tensor.equal(theirs[name]), f"{one}: {name}"
