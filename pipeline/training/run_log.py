"""Records the progress of a run: metrics.jsonl, TensorBoard, other trackers, /metrics, and the progress line."""

import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils.environment import get_cpu_distributed_information

from pipeline.checkpoints.mirror import HURRIED_SECONDS, PATIENCE_SECONDS
from pipeline.common.errors import UsageError
from pipeline.common.telemetry import Telemetry
from pipeline.config import RunConfig
from pipeline.training.collapse.reverts import REVERTS
from pipeline.training.run_directory import RunDirectory
from pipeline.training.trackers.open import open_outboxes
from pipeline.training.trackers.outbox import Outbox, flat_config
from pipeline.training.window import Report

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pipeline.training.manager import Written


log = logging.getLogger(__name__)


HELD_BACK_SHARE = 0.2
"""A run that waits for its images for more than this share of two windows in a row is held back by reading them."""


class ProgressLine:
    """One line that rewrites itself on a terminal; in a log a plain line every `log_seconds`."""

    def __init__(self, log_seconds: float = 10.0) -> None:
        self._terminal = sys.stderr.isatty()
        self._every = log_seconds
        self._last = float("-inf")

    def show(self, text: str, *, last: bool = False) -> None:
        """Show `text` as the state of things."""
        if self._terminal:
            sys.stderr.write(f"\r\x1b[K{text}" + ("\n" if last else ""))
        elif last or time.monotonic() - self._last >= self._every:
            sys.stderr.write(text + "\n")
            self._last = time.monotonic()
        sys.stderr.flush()


@contextmanager
def open_telemetry(out: Path, port: int | None, address: str) -> Iterator[Telemetry | None]:
    """Serve the metrics of the run `out` from the first process of each node; yield None in the others.

    They are served before the ranks meet, which may take long. That the port is taken is said by a later `start`, when
    all ranks can hear of it.
    """
    if get_cpu_distributed_information().local_rank:
        yield None
        return
    with closing(Telemetry("train", run=str(out.resolve()))) as telemetry:
        telemetry.set("dcgan_train_waiting_seconds", 0.0)
        telemetry.set("dcgan_train_launcher_restarts", float(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0))
        with suppress(UsageError):
            telemetry.start(port, address, None)
        yield telemetry


class RunLog:
    """Each rank has one; a rank without a run directory or a telemetry endpoint records less."""

    def __init__(self, config: RunConfig, run: RunDirectory | None, telemetry: Telemetry | None) -> None:
        self.target = config.schedule.total_images
        self.batch = config.recipe.batch
        self.run = run
        self.telemetry = telemetry
        self._progress = ProgressLine()
        self._busy_seconds = 0.0
        self._mirror_failures = 0
        self._slow_windows = 0
        self._build_command = ""
        self._outboxes: list[Outbox] = []
        self._shows_grids = False
        self._sent = 0

    def begin(
        self,
        description: dict[str, Any],
        images_seen: int,
        accelerator: "Accelerator",
        log_with: Sequence[str] = (),
    ) -> None:
        """Write config.json, begin TensorBoard's files, and set the metrics of a run that starts at `images_seen`.

        `log_with` are the trackers that get its records as well.
        """
        starts, data = 1, description["dataset"]
        if data["encoding"] == "tar":
            size, channels = (description["config"]["network"][name] for name in ("image_size", "channels"))
            spec = shlex.quote(data["source"].get("spec", "SPEC"))
            self._build_command = f"dcgan-data build webdataset {spec} OUT --size {size} --channels {channels}"
        if self.run is not None:
            self._outboxes = open_outboxes(log_with, self.run.path, description, images_seen)
            starts = self.run.write_config(description)
            self.run.open_board(images_seen)
            if "tensorboard" in log_with:
                self._shows_grids = True
                self.run.show_config(flat_config(description))
            if images_seen:  # an earlier start may not have come to send what it had saved
                self._send(images_seen)
        if (metrics := self.telemetry) is None:
            return
        metrics.set("dcgan_train_info", 1, precision=accelerator.mixed_precision, device=accelerator.device.type)
        metrics.set("dcgan_train_processes", accelerator.num_processes)
        metrics.set("dcgan_train_target_images", self.target)
        metrics.set("dcgan_train_seen_images", images_seen)
        metrics.set("dcgan_train_restarts", starts - 1)
        self.collapse(False, len(description.get(REVERTS, [])))
        # A start that never reaches its first step or checkpoint is to be seen as well.
        metrics.set("dcgan_train_last_step_timestamp_seconds", time.time())
        metrics.set("dcgan_train_checkpoint_timestamp_seconds", time.time())

    def step(self, seconds: float) -> None:
        """Record one update and its host time."""
        if (metrics := self.telemetry) is not None:
            metrics.observe("dcgan_train_step_duration_seconds", seconds)
            metrics.add("dcgan_train_images_total", self.batch)
            metrics.set("dcgan_train_last_step_timestamp_seconds", time.time())

    def window(self, report: Report, seen: int, *, mirror: tuple[int, float] = (0, 0.0), prefetched: int = 0) -> None:
        """Record a window if it ends here.

        `mirror` has the copies that failed since this process began, and the seconds by which the mirror is behind.
        `prefetched` is the number of images that this rank has at hand.
        """
        if not report.whole:
            return
        seconds = max(report.seconds - self._busy_seconds, 1e-9)  # without grids, evaluations and checkpoints
        self._busy_seconds = 0.0
        rate, wait = report.images / seconds, report.data_wait_seconds / seconds
        if self.run is not None and report.nonfinite_steps:
            log.warning("%d of %d updates had NaN or infinite gradients", report.nonfinite_steps, report.steps)
        if self.run is not None:
            timing = {
                "images_per_second": round(rate, 2),
                "data_wait_share": round(wait, 4),
                "step_milliseconds": round(1e3 * report.step_seconds * self.batch / report.images, 3),
            }
            self.run.record(seen, report.values, timing=timing)
            self._progress.show(self._line(report, seen, rate, wait), last=seen >= self.target)
            self._say_if_held_back(rate, wait)
        if (metrics := self.telemetry) is None:
            return
        values = report.values
        metrics.set("dcgan_train_seen_images", seen)
        metrics.add("dcgan_train_nonfinite_steps_total", report.nonfinite_steps)
        failures, lag_seconds = mirror
        metrics.add("dcgan_train_mirror_failures_total", failures - self._mirror_failures)
        self._mirror_failures = failures
        metrics.set("dcgan_train_mirror_lag_seconds", lag_seconds)
        metrics.set("dcgan_train_prefetched_images", prefetched)
        metrics.add("dcgan_train_phase_seconds_total", report.data_wait_seconds, phase="data_wait")
        metrics.add("dcgan_train_phase_seconds_total", max(seconds - report.data_wait_seconds, 0.0), phase="step")
        for network, letter in (("generator", "g"), ("discriminator", "d")):
            if f"loss_{letter}" not in values:
                continue
            metrics.set("dcgan_train_loss", values[f"loss_{letter}"], network=network)
            metrics.set("dcgan_train_gradient_norm", values[f"grad_norm_{letter}"], network=network)
            if letter == "d":
                for batch in ("real", "fake"):
                    metrics.set("dcgan_train_discriminator_output", values[f"d_{batch}"], batch=batch)
        metrics.set("dcgan_train_sample_diversity_ratio", values["diversity"])

    def _say_if_held_back(self, rate: float, wait: float) -> None:
        """Say once, with the rates of the window, that decoding tars of others costs more time than training."""
        # Not at the first window alone: it begins with empty buffers, and perhaps with a download.
        self._slow_windows = self._slow_windows + 1 if wait > HELD_BACK_SHARE else 0
        if self._slow_windows == 2 and self._build_command:
            log.warning(
                "reading and decoding the tars holds the training back: %s images/s, where the networks alone would "
                "reach %s; `%s` stores the images ready for use: train with --data OUT",
                f"{rate:,.0f}",
                f"{rate / max(1 - wait, 0.01):,.0f}",
                self._build_command,
            )
            self._build_command = ""

    def quality(self, values: dict[str, float], seen: int) -> None:
        """Record an evaluation."""
        if self.run is not None:
            self.run.record(seen, values)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            self._progress.show(f"image {seen:,}: {shown}", last=True)
        if self.telemetry is not None:
            for name, value in values.items():
                if math.isfinite(value):
                    self.telemetry.set("dcgan_train_quality", value, metric=name)

    def grid(self, path: Path, images_seen: int) -> None:
        """Record a grid that was just drawn."""
        if self.run is not None and self._shows_grids:
            self.run.show_grid(path, images_seen)
        for outbox in self._outboxes:
            outbox.drew(path)

    def collapse(self, collapsed: bool, reverts: int) -> None:
        """Record whether the run has fallen apart, and how often it has gone back so far."""
        if self.telemetry is not None:
            self.telemetry.set("dcgan_train_collapsed", float(collapsed))
            self.telemetry.set("dcgan_train_reverts", reverts)

    def stopped(self, seconds: Mapping[str, float], seen: int) -> None:
        """Account the time of grids, evaluations and checkpoints to their own phases, not to the training rate."""
        self._busy_seconds += sum(seconds.values())
        if self.run is not None:
            self.run.record_timing(seen, {f"{name}_seconds": round(value, 4) for name, value in seconds.items()})
        if (metrics := self.telemetry) is not None:
            for name, value in seconds.items():
                metrics.add("dcgan_train_phase_seconds_total", value, phase=name)
            if "checkpoint" in seconds:
                metrics.set("dcgan_train_checkpoint_duration_seconds", seconds["checkpoint"])

    def written(self, checkpoint: "Written | None") -> None:
        """Record the last checkpoint that is complete."""
        if checkpoint is not None:
            self._send(checkpoint.images_seen)
        if self.telemetry is not None and checkpoint is not None:
            self.telemetry.set("dcgan_train_checkpoint_write_duration_seconds", checkpoint.seconds)
            self.telemetry.set("dcgan_train_checkpoint_timestamp_seconds", checkpoint.timestamp)

    def _send(self, images_seen: int) -> None:
        if images_seen != self._sent:
            self._sent = images_seen
            for outbox in self._outboxes:
                outbox.send(images_seen)

    def close(self, *, hurry: bool = False) -> None:
        """Wait until the trackers have everything, for a time; less of it when the run was asked to stop."""
        until = time.monotonic() + (HURRIED_SECONDS if hurry else PATIENCE_SECONDS)
        for outbox in self._outboxes:
            outbox.close(until)

    def _line(self, report: Report, seen: int, rate: float, wait: float) -> str:
        values, left = report.values, max(self.target - seen, 0) / rate
        clock = f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"
        losses = [f"{letter.upper()} {values[name]:.3f}" for letter in "dg" if (name := f"loss_{letter}") in values]
        outputs = [f"D({batch}) {values[name]:.2f} " for batch in ("real", "fake") if (name := f"d_{batch}") in values]
        return (
            f"{seen:,}/{self.target:,} images ({seen / self.target:.0%})  {rate:,.0f}/s  "
            f"loss {' '.join(losses)}  {''.join(outputs)} "
            f"data wait {wait:.1%}  {clock} left"
        )
