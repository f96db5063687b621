"""Generation into an object store that fails, by processes that are killed: nothing lost, nothing wrong, none twice."""

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from storage_servers import FaultyProxy, wait_for_port

from deploy.generation.manifest import merge, read_manifest
from pipeline.common.storage import Store

SHARD_IMAGES = 32
SHARDS_PER_PART = 8
AT_ONCE = 4
# As a pod would be, a process of its own; but torch and its like are loaded once, by the server that they fork from.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["deploy.generation.pipeline", "deploy.generation.manifest", "export.samplers.torch", "s3fs", "torch"]
)


class FlakyProxy(FaultyProxy):
    """Fails a share of all requests, in all its ways."""

    def __init__(self, upstream: int, share: float, dice: random.Random) -> None:
        self._share, self._dice = share, dice
        self.failed = 0
        super().__init__(upstream)

    def _next_fault(self, request: str) -> int | str | None:
        with self._lock:
            self.requests.append(request)
            if self._dice.random() >= self._share:
                return None
            self.failed += 1
            faults: list[int | str] = [500, 503, "reset", "cut"]
            return self._dice.choice(faults)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FlakyProxy]:
    """s3://bucket on the loopback, behind a proxy that fails 5 % of the requests."""
    import subprocess

    from s3fs import S3FileSystem
    from storage_servers import free_port

    port = free_port()
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with (tmp_path / "moto.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    wait_for_port(port)
    proxy = FlakyProxy(port, 0.05, random.Random(1))
    for key, value in {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(key, value)
    S3FileSystem.clear_instance_cache()  # of a test before this one
    S3FileSystem(endpoint_url=f"http://127.0.0.1:{port}").mkdir("bucket")
    yield proxy
    proxy.stop()
    server.kill()
    server.wait()


def make_part(environment: dict[str, str], arguments: list[str], log: str) -> None:
    """Run dcgan-generate in this process, as a pod would."""
    os.environ.update(environment)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    sys.argv = ["dcgan-generate", *arguments]
    from deploy.generate import main

    main()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("parts", "kills"), [(4, 6), pytest.param(20, 30, marks=pytest.mark.slow)])
def test_random_kills_over_a_failing_store(
    bucket: FlakyProxy, model: str, tmp_path: Path, parts: int, kills: int
) -> None:
    count = parts * SHARDS_PER_PART * SHARD_IMAGES - 5  # the last shard is not full
    options = ["--model", model, "--count", str(count), "--shard-images", str(SHARD_IMAGES), "--encoders", "1"]
    environment = {key: value for key, value in os.environ.items() if key.startswith(("AWS_", "OMP_"))}
    dice = random.Random(7)
    waiting = list(range(parts))
    running: list[tuple[int, BaseProcess, float]] = []  # index, process, when to kill it
    killed = failed = 0
    deadline = time.monotonic() + 1100
    while waiting or running:
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
        while waiting and len(running) < AT_ONCE:
            index = waiting.pop(0)
            for _ in range(2 if dice.random() < 0.2 else 1):  # "more than one Pod could be started for the same index"
                arguments = [*options, "--out", "s3://bucket/samples", "--part", f"{index}/{parts}"]
                part = processes.Process(target=make_part, args=(environment, arguments, str(tmp_path / "log")))
                part.start()
                running.append((index, part, time.monotonic() + dice.uniform(0.05, 1.5)))
        for entry in list(running):
            index, process, when = entry
            if process.is_alive() and killed < kills and time.monotonic() > when:
                process.kill()
                process.join()
                killed += process.exitcode == -9
            if not process.is_alive():
                running.remove(entry)
                assert process.exitcode in (0, -9, 75), (tmp_path / "log").read_text()[-3000:]
                failed += process.exitcode == 75
                if process.exitcode:
                    waiting.append(index)
        time.sleep(0.01)
    assert killed >= kills
    assert bucket.failed > 10

    store = Store("s3://bucket/samples")
    assert read_manifest(store) is not None  # whoever came last has written it
    merged = merge(store, verify=True, tidy=True)
    whole = tmp_path / "whole"
    single = processes.Process(target=make_part, args=({}, [*options, "--out", str(whole)], str(tmp_path / "log")))
    single.start()
    single.join()
    expected = read_manifest(Store(whole))
    assert expected is not None
    assert [(shard.start, shard.sha256) for shard in merged.shards] == [(s.start, s.sha256) for s in expected.shards]
    assert sum(shard.images for shard in merged.shards) == count
    names = {name for name in store.names() if name.endswith(".tar")}
    assert names == {shard.name for shard in merged.shards}
    for name in ("dataset.json", *sorted(names)[:3]):
        assert store.read(name) == (whole / name).read_bytes()
    print(f"{killed} kills, {failed} gave up, {bucket.failed} of {len(bucket.requests)} requests failed")
