"""Generation into an object store that fails, by processes that are killed: nothing lost, nothing wrong, none twice."""

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm_start
from storage_servers import FaultyProxy, s3_server

from deploy.generation.manifest import merge, read_manifest
from pipeline.common.storage import Store

SHARD_IMAGES = 32
SHARDS_PER_PART = 8
AT_ONCE = 4


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
    from s3fs import S3FileSystem

    with s3_server(tmp_path / "s3.log") as port:
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


def start(arguments: list[str], log: Path) -> warm_start.Popen:
    """Start dcgan-generate, as a pod would."""
    command = [sys.executable, "-c", "from deploy.generate import main; main()", *arguments]
    with log.open("a") as file:
        return warm_start.Popen(command, stdout=file, stderr=file)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("parts", "kills"), [(2, 2), pytest.param(20, 30, marks=pytest.mark.slow)])
def test_random_kills_over_a_failing_store(
    bucket: FlakyProxy, model: str, tmp_path: Path, parts: int, kills: int
) -> None:
    count = parts * SHARDS_PER_PART * SHARD_IMAGES - 5  # the last shard is not full
    options = ["--model", model, "--count", str(count), "--shard-images", str(SHARD_IMAGES), "--encoders", "1"]
    log = tmp_path / "log"
    dice = random.Random(7)
    waiting = list(range(parts))
    running: list[tuple[int, warm_start.Popen, float]] = []  # index, process, when to kill it
    killed = failed = 0
    deadline = time.monotonic() + 1100
    while waiting or running:
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        while waiting and len(running) < AT_ONCE:
            index = waiting.pop(0)
            for _ in range(2 if dice.random() < 0.2 else 1):  # "more than one Pod could be started for the same index"
                arguments = [*options, "--out", "s3://bucket/samples", "--part", f"{index}/{parts}"]
                running.append((index, start(arguments, log), time.monotonic() + dice.uniform(0.05, 1.5)))
        for entry in list(running):
            index, process, when = entry
            if process.poll() is None and killed < kills and time.monotonic() > when:
                process.kill()
                killed += process.wait() == -9
            if process.poll() is not None:
                running.remove(entry)
                assert process.returncode in (0, -9, 75), log.read_text()[-3000:]
                failed += process.returncode == 75
                if process.returncode:
                    waiting.append(index)
        time.sleep(0.01)
    assert killed >= kills
    assert bucket.failed > parts

    store = Store("s3://bucket/samples")
    assert read_manifest(store) is not None  # whoever came last has written it
    merged = merge(store, verify=True, tidy=True)
    whole = tmp_path / "whole"
    assert start([*options, "--out", str(whole)], log).wait() == 0
    expected = read_manifest(Store(whole))
    assert expected is not None
    assert [(shard.start, shard.sha256) for shard in merged.shards] == [(s.start, s.sha256) for s in expected.shards]
    assert sum(shard.images for shard in merged.shards) == count
    names = {name for name in store.names() if name.endswith(".tar")}
    assert names == {shard.name for shard in merged.shards}
    for name in ("dataset.json", *sorted(names)[:3]):
        assert store.read(name) == (whole / name).read_bytes()
    print(f"{killed} kills, {failed} gave up, {bucket.failed} of {len(bucket.requests)} requests failed")
