"""A private Prometheus and Pushgateway on loopback, for the demo and the tests. They come from Debian's packages."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from pipeline.common.errors import UnavailableError

FOLDER = Path(__file__).parent
PROGRAMS = ("prometheus", "prometheus-pushgateway")
START_SECONDS = 30.0


@dataclass(frozen=True)
class Series:
    """One time series: its labels, and its points as (Unix time, value)."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


def shorten(rules: str, minute_seconds: int) -> str:
    """Return the rules with all times scaled, so that a minute in them takes `minute_seconds`.

    This scales durations such as [10m] and `for: 1h`, and thresholds in minutes such as `10 * 60`.
    """

    def scaled(match: re.Match[str]) -> str:
        minutes = int(match[1]) * (60 if match[2] == "h" else 1)
        return f"{minutes * minute_seconds}s"

    return re.sub(r"\b(\d+)([mh])\b", scaled, rules).replace("* 60", f"* {minute_seconds}")


def find_programs() -> list[str]:
    """Return the paths of both programs. Raises UnavailableError."""
    paths = [shutil.which(name) for name in PROGRAMS]
    if missing := [name for name, path in zip(PROGRAMS, paths, strict=True) if path is None]:
        raise UnavailableError(f"{' and '.join(missing)}: not installed; apt-get install {' '.join(PROGRAMS)}")
    return [path for path in paths if path is not None]


class Monitoring:
    """Context manager that runs both servers with this package's configuration; their files lie under `folder`."""

    def __init__(
        self, folder: Path, *, port: int = 0, gateway_port: int = 0, scrape: str = "5s", minute_seconds: int = 60
    ) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{port or free_port()}"
        self.gateway = f"127.0.0.1:{gateway_port or free_port()}"
        self._scrape, self._minute_seconds = scrape, minute_seconds
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        prometheus, gateway = find_programs()
        targets = self.folder / "targets"
        shutil.rmtree(targets, ignore_errors=True)  # files of an earlier start
        targets.mkdir(parents=True)
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": self._scrape, "evaluation_interval": self._scrape}
        config["scrape_configs"][1]["static_configs"] = [{"targets": [self.gateway]}]
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (self.folder / "rules.yml").write_text(shorten((FOLDER / "rules.yml").read_text(), self._minute_seconds))
        # By default, all Pushgateways of Debian on this machine share one file of kept values.
        self._start(gateway, f"--web.listen-address={self.gateway}", "--persistence.file=pushed")
        self._start(
            prometheus,
            "--config.file=prometheus.yml",
            "--storage.tsdb.path=data",
            f"--web.listen-address={self.address}",
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def watch(self, name: str, port: int) -> None:
        """Start to scrape 127.0.0.1:`port`."""
        path = self.folder / "targets" / f"{name}.json"
        path.with_suffix(".tmp").write_text(json.dumps([{"targets": [f"127.0.0.1:{port}"]}]))
        path.with_suffix(".tmp").rename(path)

    def unwatch(self, name: str) -> None:
        """Stop scraping the target `name`."""
        (self.folder / "targets" / f"{name}.json").unlink(missing_ok=True)

    def query(self, expr: str) -> list[Series]:
        """Return the current value of PromQL `expr`."""
        answer = self._get("query", query=expr)
        if answer["resultType"] == "scalar":
            return [Series({}, [_point(answer["result"])])]
        return [Series(item["metric"], [_point(item["value"])]) for item in answer["result"]]

    def query_range(self, expr: str, start: float, end: float, step: float) -> list[Series]:
        """Return the values of PromQL `expr` from `start` to `end` (Unix times), every `step` seconds."""
        answer = self._get("query_range", query=expr, start=str(start), end=str(end), step=str(step))
        return [Series(item["metric"], [_point(value) for value in item["values"]]) for item in answer["result"]]

    def firing(self) -> set[tuple[str, str]]:
        """Return (alert, run) of all alerts that fire."""
        alerts = self.query('ALERTS{alertstate="firing"}')
        return {(alert.labels["alertname"], alert.labels.get("run", "")) for alert in alerts}

    def _get(self, endpoint: str, **parameters: str) -> Any:
        url = f"http://{self.address}/api/v1/{endpoint}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{parameters.get('query')}: {error.read().decode()}") from None

    def _start(self, *command: str) -> None:
        name = Path(command[0]).name
        with (self.folder / f"{name}.log").open("wb") as log:
            # In their own session, so that Ctrl-C does not stop them before the programs have pushed their last values.
            self._processes.append(
                subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)
            )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        for address in (self.gateway, self.address):
            while True:
                try:
                    urllib.request.urlopen(f"http://{address}/-/ready", timeout=5).close()
                    break
                except OSError:
                    if time.monotonic() > deadline or any(process.poll() is not None for process in self._processes):
                        raise UnavailableError(f"{address} does not answer; see the logs in {self.folder}") from None
                    time.sleep(0.1)

    def _stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()


def free_port() -> int:
    """Return a free port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _point(pair: list[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])
