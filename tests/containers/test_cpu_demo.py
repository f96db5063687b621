"""The cpu-demo overlay as containers: train on two pods, lose one, recover; export; generate; merge."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pods import Cluster, podman, wait_until

from pipeline.common.storage import sha256_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
IMAGE = "localhost/dcgan:0.1.0"
IMAGES = 2560  # four log intervals of the demo preset
CONFINED = ["--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", "--user=10001:10001", "--network=none"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    folder.chmod(0o755)
    work = folder / "work"
    work.mkdir()
    os.chown(work, 10001, 10001)  # fsGroup
    for parent in folder.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/tmp") and "pytest" in parent.name:
            parent.chmod(0o755)
    cluster = Cluster("cpu-demo", work, {"TOTAL_IMAGES": str(IMAGES), "COUNT": "12000"})
    yield cluster
    cluster.close()


def metrics(cluster: Cluster) -> list[dict[str, float]]:
    path = cluster.work / "run/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_image_runs_confined() -> None:
    assert podman("image", "inspect", "--format", "{{.User}}", IMAGE) == "10001:10001"
    for command in ("dcgan-data", "dcgan-eval", "dcgan-export", "dcgan-generate", "dcgan-launch"):
        assert "Usage" in podman("run", "--rm", *CONFINED, IMAGE, command, "--help")
    assert "5,000 images" in podman("run", "--rm", *CONFINED, IMAGE, "dcgan-data", "verify", "/opt/dcgan/share/faces")
    written = subprocess.run(
        ["podman", "run", "--rm", *CONFINED, IMAGE, "sh", "-c", "touch /opt/dcgan/x"], capture_output=True, check=False
    )
    assert b"Read-only file system" in written.stderr


@pytest.mark.parametrize(("command", "code"), [("exit 65", 65), ("kill -9 $$", 137)])
def test_codes_come_through_the_image(command: str, code: int) -> None:
    done = subprocess.run(["podman", "run", "--rm", *CONFINED, IMAGE, "sh", "-c", command], check=False)
    assert done.returncode == code


def test_two_pods_train_and_survive_the_death_of_one(cluster: Cluster) -> None:
    first, second = cluster.run_job("train")
    wait_until(lambda: metrics(cluster), 600, "training:\n" + first.logs() + second.logs())
    assert "2 processes" in first.logs() or "machine 0 of 2" in first.logs()
    first.kill("USR1")  # save now
    checkpoints = cluster.work / "run/checkpoints"
    wait_until(lambda: list(checkpoints.glob("*/state.json")), 600, "a checkpoint")
    saved = max(int(path.parent.name) for path in checkpoints.glob("*/state.json"))
    assert saved < IMAGES
    second.kill("KILL")
    assert second.wait(30) == 137
    assert first.wait(120) == 75  # which the Job counts as "again", not as "never"
    first, second = cluster.run_job("train")
    assert (first.wait(600), second.wait(60)) == (0, 0), first.logs() + second.logs()
    assert str(saved) in first.logs().replace(",", "")
    images = [line["images"] for line in metrics(cluster) if "loss_g" in line]
    assert images == sorted(set(images))  # no interval is there twice, and none is missing:
    assert len({after - before for before, after in zip(images, images[1:], strict=False)}) == 1
    assert images[-1] == IMAGES


def test_a_drained_training_saves_and_goes_on(cluster: Cluster) -> None:
    cluster.settings["TOTAL_IMAGES"] = "1000000"
    first, second = cluster.run_job("train")
    wait_until(lambda: metrics(cluster)[-1]["images"] > IMAGES, 600, "further training")
    second.kill("TERM")  # only one node is drained: all ranks agree to stop
    assert (first.wait(600), second.wait(600)) == (143, 143), first.logs() + second.logs()
    newest = max((cluster.work / "run/checkpoints").glob("*/state.json")).parent.name
    assert int(newest) == metrics(cluster)[-1]["images"]


def test_the_best_checkpoint_becomes_a_model(cluster: Cluster) -> None:
    pod = cluster.start("export")
    assert pod.wait(300) == 0, pod.logs()
    for name in ("model/model.onnx", "model/model.json", "published/model.onnx", "repository/dcgan/config.pbtxt"):
        assert (cluster.work / name).is_file()


def test_three_indices_generate_and_one_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    pods = cluster.run_job("generate")
    samples = cluster.work / "samples"
    wait_until(lambda: list(samples.glob("records/000000004*.json")), 120, "a shard of index 1")
    pods[1].kill("KILL")
    assert pods[1].wait(30) == 137
    done = len(list(samples.glob("records/0*.json")))
    assert pods[0].wait(300) == pods[2].wait(300) == 0
    assert not (samples / "dataset.json").exists()
    assert done < 48
    again = cluster.start("generate", 1)
    assert again.wait(300) == 0, again.logs()
    assert (samples / "dataset.json").exists()
    merge = cluster.start("generate-merge")
    assert merge.wait(120) == 0, merge.logs()

    manifest = json.loads((samples / "manifest.json").read_text())
    assert manifest["plan"]["model_sha256"] == sha256_file(cluster.work / "model/model.onnx")
    assert sum(shard["images"] for shard in manifest["shards"]) == 12_000
    # Not in a container, all in one go, by another Python of this machine: the same files.
    shutil.copytree(cluster.work / "model", tmp_path / "model")
    command = [str(Path(sys.executable).with_name("dcgan-generate")), "--model", str(tmp_path / "model/model.onnx")]
    options = ["--count", "12000", "--shard-images", "250", "--out", str(tmp_path / "single")]
    subprocess.run([*command, *options], check=True)
    single = json.loads((tmp_path / "single/manifest.json").read_text())
    assert [s["sha256"] for s in manifest["shards"]] == [s["sha256"] for s in single["shards"]]
    assert sorted(path.name for path in samples.iterdir()) == sorted(
        path.name for path in (tmp_path / "single").iterdir() if path.name != "records"
    )


def test_a_wrong_model_fails_its_index_for_good(cluster: Cluster) -> None:
    cluster.settings["MODEL"] = "/work/nosuch.onnx"
    pod = cluster.start("generate", 0)
    assert pod.wait(60) == 65
    stops = cluster.find("Job", "generate")["spec"]["podFailurePolicy"]["rules"][-1]
    assert stops["action"] == "FailIndex"
    assert 65 in stops["onExitCodes"]["values"]
