"""The list of metrics, the endpoint that serves them, and what is pushed at the end."""

import http.server
import logging
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.common.errors import Stopped, UnavailableError, UsageError
from pipeline.common.telemetry import IDENTITY, METRICS, Program, Telemetry, metrics_table

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def touch_everything(telemetry: Telemetry) -> None:
    """Give every metric, with all values of its labels, a value."""
    for metric in METRICS[telemetry.program]:
        write = telemetry.observe if metric.kind == "histogram" else telemetry.add
        free = {label: "some" for label, values in metric.labels.items() if not values}
        bounded = [{label: value} for label, values in metric.labels.items() for value in values]
        for labels in bounded or [{}]:
            write(metric.name, 1.5, **free, **labels)


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        text: str = response.read().decode()
        return text


@pytest.fixture
def gateway() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield the address of a server that takes pushes, and the (path, body) of what it was sent."""
    pushed: list[tuple[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            pushed.append((self.path, self.rfile.read(int(self.headers["Content-Length"])).decode()))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", pushed
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("program", ["train", "generate", "build"])
def test_names_follow_prometheus_rules(program: Program, promtool: str) -> None:
    telemetry = Telemetry(program, run="faces")
    touch_everything(telemetry)
    port = telemetry.start(0, "127.0.0.1", None)
    assert port is not None
    text = scrape(port)
    telemetry.close()
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    for metric in METRICS[program]:
        assert f"# TYPE {metric.name} {metric.kind}" in text


def test_every_series_says_whose_it_is() -> None:
    telemetry = Telemetry("generate", run="s3://bucket/samples/", part="3/20")
    touch_everything(telemetry)
    for family in telemetry.registry.collect():
        for sample in family.samples:
            if not sample.name.startswith("process_"):
                assert (sample.labels["run"], sample.labels["part"]) == ("samples", "3/20")


def test_counters_begin_at_zero_so_that_their_first_rise_counts() -> None:
    telemetry = Telemetry("train", run="faces")
    shown = {sample.name for family in telemetry.registry.collect() for sample in family.samples}
    counters = {metric.name for metric in METRICS["train"] if metric.kind == "counter"}
    assert counters <= shown
    assert "dcgan_train_loss" not in shown  # a gauge that nobody has set would claim a loss of 0


def test_the_end_is_pushed_under_its_run_and_part(gateway: tuple[str, list[tuple[str, str]]]) -> None:
    address, pushed = gateway
    with Telemetry("build", run="out/faces", part="1/2") as telemetry:
        telemetry.start(None, "127.0.0.1", address)
        telemetry.add("dcgan_build_images_total", 7)
        telemetry.set("dcgan_build_last_shard_timestamp_seconds", 1)
    (first_path, first), (path, last) = pushed
    assert first_path == path
    assert path.startswith("/metrics/job/dcgan-build/")
    assert "/run/faces" in path
    assert "/part@base64/MS8y" in path  # 1/2
    # The first push takes the place of what an earlier start has left: an alert on that must end.
    assert 'dcgan_build_images_total{part="1/2",run="faces"} 0.0' in first
    assert 'dcgan_build_images_total{part="1/2",run="faces"} 7.0' in last
    # Ages would go on growing after the end, and memory is nobody's.
    assert "timestamp" not in last
    assert "process_" not in last


def test_what_is_pushed_names_the_namespace_of_its_pod(
    gateway: tuple[str, list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prometheus gives it to what it scrapes; without it the two would be series of different runs."""
    monkeypatch.setenv("POD_NAMESPACE", "dcgan")
    with Telemetry("build", run="faces") as telemetry:
        telemetry.start(None, "127.0.0.1", gateway[0])
    assert "/namespace/dcgan" in gateway[1][-1][0]


def test_an_empty_gateway_is_none() -> None:
    """As the settings of a Job leave it; to push to '' would cost a warning a start."""
    telemetry = Telemetry("build", run="faces")
    telemetry.start(None, "127.0.0.1", "")
    assert telemetry._gateway is None


@pytest.mark.parametrize(
    ("error", "failed"), [(UnavailableError("no GPU"), 1), (KeyError("a bug"), 1), (Stopped("saved"), 0)]
)
def test_a_failed_part_says_so_and_a_stopped_one_does_not(
    gateway: tuple[str, list[tuple[str, str]]], error: Exception, failed: int
) -> None:
    address, pushed = gateway
    telemetry = Telemetry("generate", run="samples")

    def fail() -> None:
        with telemetry:
            telemetry.start(None, "127.0.0.1", address)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert f'dcgan_generate_part_failed{{part="0/1",run="samples"}} {failed}.0' in pushed[-1][1]


def test_a_gateway_that_is_away_is_no_reason_to_fail(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), Telemetry("train", run="faces") as telemetry:
        telemetry.start(None, "127.0.0.1", "127.0.0.1:1")
    assert "--push-gateway 127.0.0.1:1: the metrics were not pushed" in caplog.text


def test_a_taken_port_is_named() -> None:
    with Telemetry("train", run="a") as first, Telemetry("train", run="b") as second:
        port = first.start(0, "127.0.0.1", None)
        with pytest.raises(UsageError, match=f"--metrics-port {port}: cannot listen on 127.0.0.1:{port}"):
            second.start(port, "127.0.0.1", None)


def test_closing_frees_the_port() -> None:
    with Telemetry("train", run="a") as first:
        port = first.start(0, "127.0.0.1", None)
    with Telemetry("train", run="a") as second:
        assert second.start(port, "127.0.0.1", None) == port


def test_names_carry_program_and_no_label_is_free_but_on_info() -> None:
    for program, metrics in METRICS.items():
        for metric in metrics:
            assert metric.name.startswith(f"dcgan_{program}_")
            assert not set(metric.labels) & set(IDENTITY[program])
            if not metric.name.endswith("_info"):
                assert all(metric.labels.values()), metric.name


def test_the_documentation_is_in_step() -> None:
    assert metrics_table() in DOCS.read_text()
