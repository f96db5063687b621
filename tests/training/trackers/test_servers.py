"""A run that is killed twice is one run on MLflow's own server and in W&B's files: no step twice, none missing.

`make test-trackers` puts both into build/trackers, an environment over that of the tests.
"""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, TINY
from training_cases import ENVIRONMENT, SCHEDULE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5_400)]

BIN = ROOT / "build" / "trackers" / "bin"
GRIDS = [0, 128, 256, 384, 512]
LONGER = (*SCHEDULE[1:], "schedule.total_images=512")

TRAIN = """
import os, signal, sys, time
from pathlib import Path
from pipeline.config import load_config
from pipeline.training.loop import train
from pipeline.training.trackers.outbox import Outbox
data, out, trackers, at, wait, *overrides = sys.argv[1:]
sent, send = set(), Outbox._send
def note(self, images):
    send(self, images)
    sent.update((self.tracker.name, known) for known in range(0, images + 1, 32))
Outbox._send = note  # only to know when to strike
def strike(position, reals, z):
    for _ in range(600 if position >= int(at) and position % 32 == 0 else 0):
        if int(wait) == 0 or {(name, int(wait)) for name in trackers.split(",")} <= sent:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)  # what is complete by a log boundary is sent from there on
train(load_config(overrides=overrides), data=data, out=Path(out), on_batch=strike, log_with=trackers.split(","))
"""
READ = """
import json, sys
from pathlib import Path
from wandb.proto.wandb_internal_pb2 import Record
from pipeline.training.trackers.weights_biases import records
for path in sorted(Path(sys.argv[1]).glob("wandb/*run-*/run-*.wandb")):
    for content in records(path.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        if record.HasField("history"):
            items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            print(json.dumps({"file": path.name, "step": record.history.step.num, **items}))
        if record.HasField("config"):
            keys = [item.key or ".".join(item.nested_key) for item in record.config.update]
            print(json.dumps({"file": path.name, "config": keys}))
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's server, on a data base of its own."""
    if not BIN.is_dir():
        pytest.skip("make test-trackers installs MLflow and W&B")
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--backend-store-uri", f"sqlite:///{folder}/runs.db", "--artifacts-destination", str(folder / "files")]
    command = [str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *options]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "PATH": f"{BIN}:{os.environ['PATH']}"}
    log = (folder / "log.txt").open("wb")
    server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        for _ in range(1800):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "log.txt").read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


class Api:
    """The server as its REST interface shows it: not through the client that wrote."""

    def __init__(self, address: str) -> None:
        self.root = f"{address}/api/2.0/mlflow"

    def get(self, method: str, **query: object) -> dict[str, Any]:
        text = "&".join(f"{key}={value}" for key, value in query.items())
        with urllib.request.urlopen(f"{self.root}/{method}?{text}") as answer:
            return dict(json.load(answer))

    def runs(self, experiment: str) -> list[dict[str, Any]]:
        number = self.get("experiments/get-by-name", experiment_name=experiment)["experiment"]["experiment_id"]
        body = json.dumps({"experiment_ids": [number]}).encode()
        request = urllib.request.Request(
            f"{self.root}/runs/search", body, {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request) as answer:
            return list(json.load(answer).get("runs", []))


def run(out: Path, data: Path, trackers: str, address: str, home: Path, **strike: int) -> tuple[int, str]:
    """Train with `trackers`; kill it at an image, when they have been sent a checkpoint. Return the code and stderr."""
    environment = {**ENVIRONMENT, "MLFLOW_TRACKING_URI": address, "HOME": str(home), "PYTHONPATH": str(ROOT)}
    environment |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    python = str(BIN / "python")
    if strike:
        words = [python, "-c", TRAIN, str(data), str(out), trackers, str(strike["at"]), str(strike["sent"])]
    else:
        words = [python, str(ROOT / "pipeline/train.py"), "--data", str(data), "--out", str(out)]
        words += ["--log-with", trackers]
    command = [*words, *TINY, *LONGER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1_800, check=False)
    return done.returncode, done.stderr


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_killed_twice_is_one_run_without_a_step_twice(faces32: Path, tmp_path: Path, address: str) -> None:
    out, both = tmp_path / "faces", "mlflow,wandb"
    for at, sent in ((64, 0), (192, 128), (416, 320)):
        code, errors = run(out, faces32, both, address, tmp_path, at=at, sent=sent)
        assert code == -signal.SIGKILL, errors
    code, errors = run(out, faces32, both, address, tmp_path)
    assert code == 0, errors
    written = lines(out)
    steps = sorted({line["images"] for line in written})

    api = Api(address)
    (found,) = api.runs("dcgan")
    number = found["info"]["run_id"]
    assert (found["info"]["run_name"], found["info"]["status"]) == ("faces", "FINISHED")
    assert {"key": "recipe.batch", "value": "16"} in found["data"]["params"]
    names = {name for line in written for name in line} - {"images"}
    assert {metric["key"] for metric in found["data"]["metrics"]} == names
    for name in names:
        points = api.get("metrics/get-history", run_id=number, metric_key=name)["metrics"]
        values = [(int(point["step"]), point["value"]) for point in points]
        assert values == [(line["images"], pytest.approx(line[name])) for line in written if name in line]
    files = [entry["path"] for entry in api.get("artifacts/list", run_id=number, path="images")["files"]]
    pictures = [re.fullmatch(r"images/samples\Wstep\W(\d+)\W.*\.png", name) for name in files]
    assert sorted(int(match[1]) for match in pictures if match) == GRIDS

    reader, environment = [str(BIN / "python"), "-c", READ, str(out)], {**os.environ, "PYTHONPATH": str(ROOT)}
    read = subprocess.run(reader, capture_output=True, text=True, check=True, env=environment)
    records = [json.loads(line) for line in read.stdout.splitlines()]
    assert len({record["file"] for record in records}) == 1  # every start has a file of the one id
    history = [record for record in records if "step" in record]
    assert [record["step"] for record in history] == sorted({0, *steps})
    for line in written:
        (record,) = [record for record in history if record["step"] == line["images"]]
        assert all(record[name] == pytest.approx(value) for name, value in line.items() if name != "images")
    assert [record["step"] for record in history if "samples.path" in record] == GRIDS
    assert any("recipe.batch" in record.get("config", []) for record in records)
    assert not list(out.rglob("wandb/run-*"))  # nothing was meant for the internet


def test_a_server_that_is_not_there_costs_one_line_and_gets_all_later(
    faces32: Path, tmp_path: Path, address: str
) -> None:
    out = tmp_path / "later"
    code, errors = run(out, faces32, "mlflow", "http://127.0.0.1:1", tmp_path)
    assert code == 0, errors
    said = [line for line in errors.splitlines() if line.startswith("mlflow: ")]
    assert len(said) == 1, errors
    assert "the run continues without it" in said[0]
    assert "Traceback" not in errors
    for _ in range(2):  # a run that is finished sends what is missing; the second time nothing is
        code, errors = run(out, faces32, "mlflow", address, tmp_path)
        assert code == 0, errors
    (number,) = [run["info"]["run_id"] for run in Api(address).runs("dcgan") if run["info"]["run_name"] == "later"]
    points = Api(address).get("metrics/get-history", run_id=number, metric_key="loss_g")["metrics"]
    assert [int(point["step"]) for point in points] == [line["images"] for line in lines(out) if "loss_g" in line]
