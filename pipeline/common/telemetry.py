"""The one list of metrics, and how Prometheus gets them: served at /metrics, pushed at the end.

See docs/architecture.md, contract 7.
"""

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Annotated, Any, Literal, Self

import typer

from pipeline.common.errors import Stopped, UsageError

log = logging.getLogger(__name__)

Program = Literal["train", "generate", "build"]

MetricsPort = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Serve /metrics for Prometheus here; 0 lets the system choose.")
]
MetricsAddress = Annotated[str, typer.Option(help="Address that /metrics listens on; 0.0.0.0 lets other machines in.")]
PushGateway = Annotated[str | None, typer.Option(help="HOST:PORT of a Pushgateway that gets the final counters.")]


@dataclass(frozen=True)
class Metric:
    """One Prometheus metric. Its name carries the base unit."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Labels besides `run` and `part`, with all values they take; () is one value that holds for the whole process."""
    final: bool = False
    """Whether it is pushed at the end: only what stays true of a process that is gone."""


STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)

NETWORKS = {"network": ("generator", "discriminator")}
LAST_SHARD = "When the last shard was finished; before the first, when the work began (Unix time)."
INFO = "Always 1; the labels say what runs."

IDENTITY: dict[Program, tuple[str, ...]] = {"train": ("run",), "generate": ("run", "part"), "build": ("run", "part")}
"""Labels of every metric of a program: the name of its output folder, and which part of the work this is (i/N)."""

METRICS: dict[Program, tuple[Metric, ...]] = {
    "train": (
        Metric("dcgan_train_info", "gauge", INFO, {"precision": (), "device": ()}, final=True),
        Metric("dcgan_train_processes", "gauge", "Processes that train together."),
        Metric("dcgan_train_restarts", "gauge", "Times that this run was started again; known where rank 0 is."),
        Metric(
            "dcgan_train_launcher_restarts",
            "gauge",
            "Times that dcgan-launch of this node has started its processes again, in place (--restarts).",
        ),
        Metric(
            "dcgan_train_waiting_seconds",
            "gauge",
            "How long the first rank of this node has waited for ranks that have not come; 0 once all have.",
        ),
        Metric("dcgan_train_target_images", "gauge", "Real images after which the run is done.", final=True),
        Metric("dcgan_train_seen_images", "gauge", "Real images seen since the run began, over resumes.", final=True),
        Metric(
            "dcgan_train_images_total", "counter", "Real images seen by all ranks since this process began.", final=True
        ),
        Metric("dcgan_train_step_duration_seconds", "histogram", "Host time of one update of both networks."),
        Metric(
            "dcgan_train_phase_seconds_total",
            "counter",
            "Wall time by phase; together all of it. data_wait is of the rank that waited longest. grid, evaluate and "
            "checkpoint are what stops the training.",
            {"phase": ("data_wait", "step", "grid", "evaluate", "checkpoint")},
        ),
        Metric(
            "dcgan_train_prefetched_images",
            "gauge",
            "Images that the first rank of this node has read ahead; of a set that is in memory, all that are there.",
        ),
        Metric("dcgan_train_last_step_timestamp_seconds", "gauge", "When the last update was made (Unix time)."),
        Metric("dcgan_train_loss", "gauge", "Loss, mean over the last log interval and all ranks.", NETWORKS),
        Metric(
            "dcgan_train_discriminator_output",
            "gauge",
            "Mean of sigmoid(D(x)), by what x is: 1 is taken for real.",
            {"batch": ("real", "fake")},
        ),
        Metric("dcgan_train_gradient_norm", "gauge", "L2 norm of all gradients of a network, mean.", NETWORKS),
        Metric(
            "dcgan_train_nonfinite_steps_total",
            "counter",
            "Updates that were left out for NaN or infinite gradients.",
            final=True,
        ),
        Metric(
            "dcgan_train_sample_diversity_ratio",
            "gauge",
            "Standard deviation of a pixel over a fake batch, relative to a real one: 0 when all samples are alike.",
        ),
        Metric(
            "dcgan_train_quality",
            "gauge",
            "The last evaluation, lower is better: SWD (by resolution too), MS-SSIM, and what schedule.extractor adds.",
            {"metric": ("swd", "swd_SIZE such as swd_64", "ms_ssim", "ms_ssim_real", "fid", "kid_x1000")},
            final=True,
        ),
        Metric(
            "dcgan_train_collapsed",
            "gauge",
            "1 while the last two evaluations or more say that the run has fallen apart, else 0.",
            final=True,
        ),
        Metric(
            "dcgan_train_reverts",
            "gauge",
            "Times that the run has gone back to its best checkpoint since it began, over resumes.",
            final=True,
        ),
        Metric(
            "dcgan_train_checkpoint_timestamp_seconds",
            "gauge",
            "When the last checkpoint was complete; before the first, when this process began (Unix time).",
        ),
        Metric("dcgan_train_checkpoint_duration_seconds", "gauge", "How long the last checkpoint held up training."),
        Metric(
            "dcgan_train_checkpoint_write_duration_seconds",
            "gauge",
            "How long the last checkpoint took to write, beside the training.",
        ),
        Metric(
            "dcgan_train_mirror_failures_total", "counter", "Checkpoints that did not reach the mirror.", final=True
        ),
        Metric(
            "dcgan_train_mirror_lag_seconds",
            "gauge",
            "How long the mirror has lacked a checkpoint; 0 if it has all, and without a mirror.",
        ),
    ),
    "generate": (
        Metric("dcgan_generate_info", "gauge", INFO, {"backend": (), "provider": (), "format": ()}, final=True),
        Metric("dcgan_generate_target_images", "gauge", "Images that this part consists of.", final=True),
        Metric("dcgan_generate_images_total", "counter", "Images put into shards by this process.", final=True),
        Metric("dcgan_generate_skipped_images_total", "counter", "Images that an earlier start had made.", final=True),
        Metric("dcgan_generate_written_bytes_total", "counter", "Bytes of finished shards.", final=True),
        Metric(
            "dcgan_generate_phase_seconds_total",
            "counter",
            "Time by phase, summed over the threads that do it.",
            {"phase": ("sample", "encode", "write")},
        ),
        Metric("dcgan_generate_last_shard_timestamp_seconds", "gauge", LAST_SHARD),
        Metric("dcgan_generate_part_failed", "gauge", "1 once this part has ended with an error.", final=True),
        Metric(
            "dcgan_generate_model_refused",
            "gauge",
            "1 once the model was refused: damaged, or made for another device or version.",
            final=True,
        ),
    ),
    "build": (
        Metric("dcgan_build_info", "gauge", INFO, {"source": (), "encoding": ()}, final=True),
        Metric("dcgan_build_target_images", "gauge", "Pictures that this part consists of.", final=True),
        Metric("dcgan_build_images_total", "counter", "Images in the shards finished by this process.", final=True),
        Metric("dcgan_build_skipped_images_total", "counter", "Pictures that an earlier start had done.", final=True),
        Metric("dcgan_build_refused_images_total", "counter", "Pictures left out: they cannot be used.", final=True),
        Metric("dcgan_build_written_bytes_total", "counter", "Bytes of finished shards.", final=True),
        Metric("dcgan_build_last_shard_timestamp_seconds", "gauge", LAST_SHARD),
        Metric("dcgan_build_part_failed", "gauge", "1 once this part has ended with an error.", final=True),
    ),
}


class Telemetry:
    """The metrics of one process: set and counted by name. `close` it, or use it as a context manager.

    As a context manager it also notes whether the part of the work failed; being stopped is no failure.
    Counters whose labels are known start at 0; gauges are not shown before they are set.
    """

    def __init__(self, program: Program, *, run: str, part: str = "0/1") -> None:
        """`run` is a folder or URL, of which the last component counts; `part` says which part of the work this is."""
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
        from prometheus_client.metrics import disable_created_metrics

        disable_created_metrics()  # type: ignore[no-untyped-call]
        name = str(run).rstrip("/").rpartition("/")[2] or "run"
        self.program = program
        self.identity = {key: {"run": name, "part": part}[key] for key in IDENTITY[program]}
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._gateway: str | None = None
        self._server: Any = None
        self._metrics: dict[str, Any] = {}
        self._children: dict[tuple[str, ...], Any] = {}
        for metric in METRICS[program]:
            labels = (*self.identity, *metric.labels)
            if metric.kind == "histogram":
                made: Any = Histogram(metric.name, metric.help, labels, buckets=STEP_BUCKETS, registry=self.registry)
            else:
                made = {"counter": Counter, "gauge": Gauge}[metric.kind](
                    metric.name, metric.help, labels, registry=self.registry
                )
            self._metrics[metric.name] = made
            if metric.kind != "gauge":
                self._start_at_zero(metric)

    def __enter__(self) -> Self:
        self._set_failed(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Stopped | KeyboardInterrupt):
            self._set_failed(1)
        self.close()

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._child(name, labels).set(value)

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Count up."""
        self._child(name, labels).inc(amount)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Put a value into a histogram."""
        self._child(name, labels).observe(value)

    def start(self, port: int | None, address: str, gateway: str | None) -> int | None:
        """Serve /metrics in a thread if `port` is given, and push to `gateway` (now, and once more by `close`).

        Returns the port; 0 lets the system choose. The first push replaces what an earlier start has left there. Where
        it is served already, only the gateway is new.
        Raises UsageError when the port is taken or the address is not this machine's.
        """
        from prometheus_client import start_http_server

        self._gateway = gateway or None  # '' stands for none, as an unset setting of a Job does
        self._push()
        if self._server is not None:
            return int(self._server.server_port)
        if port is None:
            return None
        try:
            self._server, _ = start_http_server(port, address, self.registry)
        except OSError as error:
            raise UsageError(
                f"--metrics-port {port}: cannot listen on {address}:{port} ({error.strerror}); "
                "choose another port, or leave the option out to serve no metrics"
            ) from None
        port = int(self._server.server_port)
        print(f"metrics on http://{address}:{port}/metrics", file=sys.stderr, flush=True)
        return port

    def close(self) -> None:
        """Push the final values, for a process may end between two scrapes, and stop serving."""
        self._push()
        self._gateway = None
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _push(self) -> None:
        """Push what stays true of a process that is gone. That nobody listens is no reason to fail."""
        if self._gateway is None:
            return
        from http.client import HTTPException

        from prometheus_client import push_to_gateway

        # What is scraped gets its namespace from Prometheus; what is pushed must bring it, or the two are strangers.
        namespace = {"namespace": name} if (name := os.environ.get("POD_NAMESPACE")) else {}
        final: Any = self.registry.restricted_registry([m.name for m in METRICS[self.program] if m.final])
        try:
            push_to_gateway(self._gateway, f"dcgan-{self.program}", final, self.identity | namespace, timeout=10)
        except (OSError, HTTPException, ValueError) as error:
            log.warning("--push-gateway %s: the metrics were not pushed: %s", self._gateway, error)

    def _set_failed(self, value: int) -> None:
        name = f"dcgan_{self.program}_part_failed"
        if name in self._metrics:
            self.set(name, value)

    def _child(self, name: str, labels: dict[str, str]) -> Any:
        key = (name, *labels.values())
        if key not in self._children:
            self._children[key] = self._metrics[name].labels(**self.identity, **labels)
        return self._children[key]

    def _start_at_zero(self, metric: Metric) -> None:
        if not metric.labels:
            self._child(metric.name, {})
        for label, values in metric.labels.items():
            for value in values:
                self._child(metric.name, {label: value})


def metrics_table() -> str:
    """Return the list as Markdown tables for the documentation."""
    lines = []
    for program, metrics in METRICS.items():
        labels = " and ".join(f"`{label}`" for label in IDENTITY[program])
        lines += [f"### {program}", "", f"All carry {labels}.", ""]
        lines += ["| name | type | further labels | meaning | pushed |", "|---|---|---|---|---|"]
        for metric in metrics:
            shown = ", ".join(
                f"`{label}`" + (f" ({', '.join(values)})" if values else "") for label, values in metric.labels.items()
            )
            lines.append(
                f"| `{metric.name}` | {metric.kind} | {shown} | {metric.help} | {'yes' if metric.final else ''} |"
            )
        lines.append("")
    return "\n".join(lines)
