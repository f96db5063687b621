"""A real Prometheus watches real programs: healthy ones, and one driven into each fault. `make test-metrics`.

Times are shortened so that a minute of the rules takes a second. Nothing here measures speed: every wait ends as soon
as what is waited for is there.
"""

import functools
import hashlib
import http.server
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from deploy.grafana.dashboards import DASHBOARDS, FOLDER
from deploy.grafana.page import fill_in
from deploy.prometheus.servers import Monitoring, find_programs, free_port
from pipeline.common.errors import UnavailableError
from pipeline.common.telemetry import METRICS, Telemetry
from pipeline.data.dataset import dump_dataset, open_dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SCRAPE_SECONDS = 0.25
PATIENCE_SECONDS = 240.0
SMALL = {
    "network.width": 4,
    "recipe.batch": 32,
    "schedule.log_every_images": 160,
    "schedule.evaluate_samples": 64,
}
FOR_EVER = {
    "schedule.total_images": 10**9,
    "schedule.grid_every_images": 10**9,
    "schedule.evaluate_every_images": 10**9,
}
UNSAVED = {"schedule.checkpoint_every_images": 10**9}


class Programs:
    """Starts programs that Prometheus watches; what still runs at the end of a test is killed."""

    def __init__(self, monitoring: Monitoring, folder: Path) -> None:
        self.monitoring = monitoring
        self.folder = folder
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self.ports: dict[str, int] = {}

    def start(self, name: str, *command: str, push: bool = True, **environment: str) -> subprocess.Popen[bytes]:
        """Start `command`, with the options for metrics; `name` must be new."""
        port = self.ports[name] = free_port()
        options = ["--metrics-port", str(port)] + (["--push-gateway", self.monitoring.gateway] if push else [])
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, *options],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )
        self._started[name] = process
        self.monitoring.watch(name, port)
        return process

    def train(
        self, name: str, data: str, *settings: dict[str, Any], options: tuple[str, ...] = (), **more: Any
    ) -> subprocess.Popen[bytes]:
        """Start a training run in one process."""
        merged = functools.reduce(lambda left, right: left | right, settings, SMALL)
        overrides = [f"{key}={value}" for key, value in merged.items()]
        out = str(self.folder / name)
        return self.start(
            name, sys.executable, "pipeline/train.py", "--data", data, "--out", out, *options, *overrides, **more
        )

    def wait(self, condition: Callable[[], object], what: str, *, alive: str | None = None) -> None:
        """Wait until `condition` holds; fail when the program `alive` ends before, or patience does."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            ended = alive is not None and self._started[alive].poll() is not None and not condition()
            if ended or time.monotonic() > deadline:
                logs = "\n".join(f"{path.name}: ...{path.read_text()[-1500:]}" for path in self.folder.glob("*.log"))
                pytest.fail(
                    f"{what}: {f'{alive} ended' if ended else 'waited in vain'}; {self.monitoring.firing()}\n{logs}"
                )
            time.sleep(SCRAPE_SECONDS)

    def wait_for_alert(self, alert: str, run: str, *, alive: str | None = None) -> None:
        """Wait until `alert` fires for `run`."""
        self.wait(lambda: (alert, run) in self.monitoring.firing(), f"{alert} for {run}", alive=alive)

    def wait_for_images(self, run: str, images: int) -> None:
        """Wait until a run has seen so many images."""
        self.wait(
            lambda: any(
                s.points[0][1] >= images for s in self.monitoring.query(f'dcgan_train_seen_images{{run="{run}"}}')
            ),
            f"{run} sees {images} images",
            alive=run,
        )

    def kill(self, name: str) -> None:
        """Kill a program and all that it started."""
        for process in family(self._started[name]):
            process.kill()
        self._started[name].wait()

    def close(self) -> None:
        """Kill what still runs."""
        for name, process in self._started.items():
            if process.poll() is None:
                self.kill(name)
            self.monitoring.unwatch(name)


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return a running process and all its descendants; launchers give each a session of its own."""
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


@pytest.fixture(scope="module")
def monitoring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitoring]:
    try:
        find_programs()
    except UnavailableError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("prometheus")
    with Monitoring(folder, scrape=f"{int(SCRAPE_SECONDS * 1000)}ms", minute_seconds=1) as servers:
        yield servers


@pytest.fixture
def programs(monitoring: Monitoring, tmp_path: Path) -> Iterator[Programs]:
    started = Programs(monitoring, tmp_path)
    yield started
    started.close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a data set of 512 faces in 16 shards."""
    out = str(tmp_path_factory.mktemp("shards") / "faces")
    command = [str(BIN / "dcgan-data"), "build", "webdataset", "data/faces", out, "--limit", "512"]
    subprocess.run([*command, "--shard-images", "32"], cwd=ROOT, check=True, capture_output=True)
    return out


def test_healthy_programs_fill_every_panel_and_raise_nothing(
    programs: Programs, monitoring: Monitoring, promtool: str
) -> None:
    began = time.time()
    data, run, samples = (programs.folder / name for name in ("data", "healthy", "samples"))
    scraped: dict[str, str] = {}

    def scrape(name: str) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{programs.ports[name]}/metrics", timeout=10) as response:
            scraped[name] = response.read().decode()

    build = [str(BIN / "dcgan-data"), "build", "webdataset", "data/faces", str(data), "--workers", "1"]
    # PNG, because it takes seconds: a build of packed shards is over before it is seen.
    building = programs.start("data", *build, "--shard-images", "100", "--encoding", "png")
    programs.wait(
        lambda: monitoring.query('dcgan_build_images_total{run="data", instance!=""} > 500'), "build", alive="data"
    )
    scrape("data")
    assert building.wait(PATIENCE_SECONDS) == 0

    launch = "launch --quiet --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    settings = SMALL | {
        "schedule.total_images": 8_000,
        "schedule.grid_every_images": 1_600,
        "schedule.checkpoint_every_images": 1_600,
        "schedule.evaluate_every_images": 1_600,
    }
    training = programs.start(
        "healthy",
        str(BIN / "accelerate"),
        *launch.split(),
        *("pipeline/train.py", "--data", str(data), "--out", str(run)),
        *(f"{key}={value}" for key, value in settings.items()),
        ACCELERATE_USE_CPU="true",
    )
    programs.wait(lambda: monitoring.query('dcgan_train_quality{run="healthy"}'), "an evaluation", alive="healthy")
    programs.wait(lambda: any(run.glob("checkpoints/*/state.json")), "a checkpoint", alive="healthy")
    generate = [str(BIN / "dcgan-generate"), "--model", str(run), "--count", "20000", "--shard-images", "250"]
    generating = programs.start("samples", *generate, "--out", str(samples))
    programs.wait(
        lambda: monitoring.query('dcgan_generate_written_bytes_total{run="samples", instance!=""} > 0'),
        "a shard",
        alive="samples",
    )
    scrape("samples")
    scrape("healthy")
    programs.wait(lambda: generating.poll() is not None, "the generation's end")
    programs.wait(lambda: training.poll() is not None, "the run's end")
    assert (generating.returncode, training.returncode) == (0, 0), (run / "log.txt").read_text()
    time.sleep(4 * SCRAPE_SECONDS)
    end = time.time()

    def values(expr: str) -> list[float]:
        series = monitoring.query_range(fill_in(expr, scrape_seconds=SCRAPE_SECONDS), began, end, 2 * SCRAPE_SECONDS)
        return [value for each in series for _, value in each.points if math.isfinite(value)]

    # Two processes trained, and the last word of each program is kept although it may not have been scraped.
    assert set(values("dcgan_train_processes")) == {2.0}
    for name, images in (("train_seen", 8_000), ("generate", 20_000), ("build", 5_000)):
        total = "images" if name == "train_seen" else "images_total"
        (kept,) = monitoring.query(f'dcgan_{name}_{total}{{job=~"dcgan-.*", run=~"healthy|samples|data"}}')
        assert kept.points[0][1] == images

    # Every panel's every query returns data, and every series that a rule is made of exists.
    for file in DASHBOARDS:
        for panel in json.loads((FOLDER / file).read_text())["panels"]:
            for target in panel.get("targets", []):
                assert values(target["expr"]), f"{file}, {panel['title']}: {target['expr']}"
    for group in yaml.safe_load((monitoring.folder / "rules.yml").read_text())["groups"]:
        for rule in group["rules"]:
            if "record" in rule:
                assert values(rule["record"]), rule["record"]
            for selector in selectors(rule["expr"]):
                assert values(selector), f"{rule.get('alert', rule.get('record'))}: {selector}"

    # The list is complete, its label values are all there are, and promtool has no complaint.
    for program, name in (("train", "healthy"), ("generate", "samples"), ("build", "data")):
        checked = subprocess.run(
            [promtool, "check", "metrics"], input=scraped[name], capture_output=True, text=True, check=False
        )
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
        for metric in METRICS[program]:  # type: ignore[index]
            lines = re.findall(rf"^{metric.name}(?:_count)?\{{.*$", scraped[name], re.MULTILINE)
            assert lines, metric.name
            for label, known in metric.labels.items():
                found = set(re.findall(rf'\b{label}="([^"]*)"', "\n".join(lines)))
                assert found <= set(known) or not known, f"{metric.name}: {found}"

    # Twenty "minutes" later, nothing has fired: not for work, and not for its end.
    programs.wait(lambda: time.time() > end + 20, "some time")
    fired = monitoring.query_range('ALERTS{alertstate="firing", run!=""}', began, time.time(), SCRAPE_SECONDS)
    serious = {"DcganTrainVanished", "DcganPartVanished", "DcganPartFailed", "DcganModelRefused", "DcganTrainNonFinite"}
    assert not serious & {series.labels["alertname"] for series in fired}
    assert not monitoring.query('ALERTS{alertname="DcganExporterAbsent"}')


def selectors(expr: str) -> set[str]:
    """Return the vector selectors of a PromQL expression that name our metrics."""
    found = re.findall(r"(?:(?:run|part):)?\bdcgan_\w+(?::\w+)?(?:\{[^}]*\})?|\{__name__[^}]*\}", expr)
    return {selector for selector in found if not selector.startswith("dcgan_(")}


class SlowServer(http.server.ThreadingHTTPServer):
    """Serves a data set of many copies of each of its shards: too large to be kept in memory, each fetched once."""

    COPIES = 100  # 51,200 images of 12 KiB

    def __init__(self, shards: str) -> None:
        self.delay_seconds = 0.0
        dataset = open_dataset(shards)
        contents = {shard.name: (Path(shards) / shard.name).read_bytes() for shard in dataset.shards}
        copies = []
        for shard in dataset.shards:
            digest = hashlib.sha256(contents[shard.name])
            for number in range(self.COPIES):  # a tar may end in any number of empty blocks, and is another file then
                differing = {
                    "name": f"{number}-{shard.name}",
                    "sha256": digest.hexdigest(),
                    "bytes": shard.bytes + 512 * number,
                }
                copies.append(shard.model_copy(update=differing))
                digest.update(bytes(512))
        totals = {"images": sum(copy.images for copy in copies), "bytes": sum(copy.bytes for copy in copies)}
        listing = dump_dataset(dataset.model_copy(update={"shards": copies, **totals}))

        class Handler(http.server.BaseHTTPRequestHandler):
            server: SlowServer

            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                found = name == "dataset.json" or name.endswith(".tar")
                self.send_response(200 if found else 404)
                self.end_headers()
                if name.endswith(".tar"):
                    time.sleep(self.server.delay_seconds)
                    number, _, original = name.partition("-")
                    self.wfile.write(contents[original] + bytes(512 * int(number)))
                elif found:
                    self.wfile.write(listing)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


def test_no_data_a_hanging_rank_and_a_kill(programs: Programs, shards: str) -> None:
    """One run of two processes from a web server that grows slow; then a rank hangs; then all are killed."""
    server = SlowServer(shards)
    # Two streams hold few shards, none is read ahead of time, and a shard of 32 images lasts for two updates.
    more = {"runtime.step_timeout_seconds": 0, "runtime.lookahead_mb": 0, "recipe.streams": 2}
    more["schedule.log_every_images"] = 64
    training = programs.start(
        "starved",
        str(BIN / "dcgan-launch"),
        *("--processes", "2", "train", "--data", server.url, "--out", str(programs.folder / "starved")),
        *(f"{key}={value}" for key, value in (SMALL | FOR_EVER | UNSAVED | more).items()),
        ACCELERATE_USE_CPU="true",
        DCGAN_CACHE=str(programs.folder / "cache"),
    )
    programs.wait_for_images("starved", 1_600)
    server.delay_seconds = 3.0
    programs.wait_for_alert("DcganDataWait", "starved", alive="starved")
    programs.wait_for_alert("DcganThroughputDrop", "starved", alive="starved")

    # A rank hangs: the others wait for it in a collective, where the exporter still answers.
    server.delay_seconds = 0.0
    (hanging,) = [process for process in family(training) if process.environ().get("RANK") == "1"]
    hanging.suspend()
    programs.wait_for_alert("DcganTrainStalled", "starved", alive="starved")
    programs.kill("starved")
    programs.wait_for_alert("DcganTrainVanished", "starved")
    server.shutdown()
    server.server_close()


def test_a_learning_rate_that_collapses_g(programs: Programs, shards: str) -> None:
    programs.train("collapsed", shards, FOR_EVER, UNSAVED, {"recipe.learning_rate_g": 1})
    programs.wait_for_alert("DcganDiversityLow", "collapsed", alive="collapsed")
    programs.wait_for_alert("DcganDiscriminatorWins", "collapsed", alive="collapsed")


def test_a_discriminator_that_learns_nothing_and_no_checkpoint(programs: Programs, shards: str) -> None:
    programs.train("naive", shards, FOR_EVER, UNSAVED, {"recipe.learning_rate_d": 1e-12})
    programs.wait_for_alert("DcganGeneratorWins", "naive", alive="naive")
    programs.wait_for_alert("DcganCheckpointStale", "naive", alive="naive")


def test_nan(programs: Programs, shards: str) -> None:
    training = programs.train("diverged", shards, FOR_EVER, {"recipe.learning_rate_g": 1e30})
    programs.wait_for_alert("DcganTrainNonFinite", "diverged")
    assert training.wait(PATIENCE_SECONDS) == 65
    # The same run with a sound learning rate: its first push ends the alert.
    overrides = {"recipe.learning_rate_g": 1e-4}
    programs.monitoring.unwatch("diverged")
    again = programs.train("diverged", shards, FOR_EVER, overrides)
    programs.wait(
        lambda: ("DcganTrainNonFinite", "diverged") not in programs.monitoring.firing(), "silence", alive="diverged"
    )
    again.send_signal(signal.SIGTERM)
    assert again.wait(PATIENCE_SECONDS) == 143


def test_a_run_that_is_started_again_and_again(programs: Programs, shards: str) -> None:
    config = programs.folder / "restless" / "config.json"
    for restarts in (0, 1, 6):
        if restarts:  # five more starts than there were: an "hour" is a minute here
            config.write_text(json.dumps({**json.loads(config.read_text()), "starts": restarts}))
        training = programs.train("restless", shards, FOR_EVER, UNSAVED)
        programs.wait(
            functools.partial(programs.monitoring.query, f'dcgan_train_restarts{{run="restless"}} == {restarts}'),
            f"restart {restarts} is seen",
            alive="restless",
        )
        if restarts < 6:
            training.send_signal(signal.SIGTERM)
            assert training.wait(PATIENCE_SECONDS) == 143
    programs.wait_for_alert("DcganRestarting", "restless", alive="restless")


def test_ranks_that_wait_for_one_that_does_not_come(programs: Programs, shards: str) -> None:
    out = str(programs.folder / "waiting")
    launch = [str(BIN / "dcgan-launch"), "--nodes", "2", "--processes", "1", "--address", "127.0.0.1"]
    launch += ["--port", str(free_port())]
    train = ["train", "--data", shards, "--out", out, *(f"{key}={value}" for key, value in (SMALL | FOR_EVER).items())]
    programs.start("waiting", *launch, "--node-rank", "0", *train)
    programs.wait_for_alert("DcganRanksWaiting", "waiting", alive="waiting")
    programs.start("late", *launch, "--node-rank", "1", *train)
    programs.wait_for_images("waiting", 160)
    programs.wait(lambda: ("DcganRanksWaiting", "waiting") not in programs.monitoring.firing(), "silence")


def test_a_launcher_that_starts_its_processes_again_and_again(programs: Programs) -> None:
    """The count comes from this process: an "hour" is a minute here, and a trainer may take as long to start."""
    port = free_port()
    with closing(Telemetry("train", run="clumsy")) as telemetry:
        telemetry.start(port, "127.0.0.1", None)
        programs.monitoring.watch("clumsy", port)
        telemetry.set("dcgan_train_launcher_restarts", 1)
        seen = 'count_over_time((dcgan_train_launcher_restarts{run="clumsy"} == 1)[1m:5s]) >= 2'  # as the rule looks
        programs.wait(lambda: bool(programs.monitoring.query(seen)), "the first restart")
        telemetry.set("dcgan_train_launcher_restarts", 6)
        programs.wait_for_alert("DcganRestarting", "clumsy")
        programs.monitoring.unwatch("clumsy")


def test_a_mirror_that_is_lost(programs: Programs, shards: str) -> None:
    mirror = programs.folder / "mirror"
    mirror.mkdir()
    often = {"schedule.checkpoint_every_images": 160}
    programs.train("unmirrored", shards, FOR_EVER, often, options=("--mirror", str(mirror)))
    programs.wait(lambda: any(mirror.glob("checkpoints/*/state.json")), "a mirrored checkpoint", alive="unmirrored")
    mirror.rename(programs.folder / "gone")
    mirror.write_text("a file where a folder was")
    programs.wait_for_alert("DcganMirrorFailing", "unmirrored", alive="unmirrored")


def test_parts_that_fail_are_refused_hang_and_vanish(programs: Programs, shards: str) -> None:
    trained = programs.folder / "trained"
    training = programs.train(
        "trained", shards, {"schedule.total_images": 160, "schedule.evaluate_every_images": 10**9}
    )
    assert training.wait(PATIENCE_SECONDS) == 0
    generate = [str(BIN / "dcgan-generate"), "--count", "1000000"]

    damaged = programs.folder / "damaged.onnx"
    damaged.write_bytes(b"not a model")
    refused = programs.start("refused", *generate, "--model", str(damaged), "--out", str(programs.folder / "refused"))
    assert refused.wait(PATIENCE_SECONDS) == 65
    programs.wait_for_alert("DcganModelRefused", "refused")
    assert ("DcganPartFailed", "refused") not in programs.monitoring.firing()

    occupied = programs.folder / "occupied"
    occupied.write_text("a file where a folder should be")
    failed = programs.start("occupied", *generate, "--model", str(trained), "--out", str(occupied))
    assert failed.wait(PATIENCE_SECONDS) not in (0, 1)
    programs.wait_for_alert("DcganPartFailed", "occupied")

    unready = [*generate, "--model", str(trained), "--shard-images", "1000000", "--format", "packed"]
    programs.start("hanging", *unready, "--out", str(programs.folder / "hanging"))
    programs.wait_for_alert("DcganPartStalled", "hanging", alive="hanging")
    programs.kill("hanging")
    programs.wait_for_alert("DcganPartVanished", "hanging")


def test_a_target_that_never_answers(monitoring: Monitoring, programs: Programs) -> None:
    monitoring.watch("nobody", free_port())
    programs.wait(lambda: ("DcganExporterAbsent", "") in monitoring.firing(), "DcganExporterAbsent")
    monitoring.unwatch("nobody")
