"""Every value of a window reaches metrics.jsonl and /metrics under its own name; and what a run says as it begins."""

import dataclasses
import json
import logging
import socket
import urllib.request
from pathlib import Path

import pytest
from accelerate import Accelerator
from ports import free_port

from pipeline.common import machine
from pipeline.common.errors import UsageError
from pipeline.common.telemetry import Telemetry
from pipeline.config import load_config
from pipeline.training import preflight
from pipeline.training.manager import Written
from pipeline.training.run_directory import RunDirectory
from pipeline.training.run_log import RunLog, open_telemetry
from pipeline.training.window import Report

VALUES = {
    "loss_d": 1.25,
    "loss_g": 0.5,
    "d_real": 0.75,
    "d_fake": 0.125,
    "grad_norm_d": 3.0,
    "grad_norm_g": 5.0,
    "diversity": 0.875,
}
REPORT = Report(
    whole=True,
    values=VALUES,
    images=512,
    steps=4,
    nonfinite_steps=1,
    weights_finite=True,
    hopeless_steps=0,
    stop=0,
    save=False,
    slowest_step_seconds=2.0,
    seconds=8.0,
    data_wait_seconds=2.0,
    step_seconds=1.0,
    affordable=0,
)


def test_metrics_are_served_before_the_ranks_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    port = free_port()
    with open_telemetry(tmp_path / "run", port, "127.0.0.1") as telemetry:
        assert telemetry is not None
        telemetry.set("dcgan_train_waiting_seconds", 90.0)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
        assert 'dcgan_train_waiting_seconds{run="run"} 90.0' in text
        assert 'dcgan_train_launcher_restarts{run="run"} 3.0' in text
        assert telemetry.start(port, "127.0.0.1", None) == port, "the one that is there already"
    monkeypatch.setenv("LOCAL_RANK", "1")
    with open_telemetry(tmp_path / "run", port, "127.0.0.1") as telemetry:
        assert telemetry is None


def test_a_port_that_is_taken_is_said_when_all_ranks_hear_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with open_telemetry(tmp_path, port, "127.0.0.1") as telemetry:
            assert telemetry is not None
            with pytest.raises(UsageError, match="cannot listen"):
                telemetry.start(port, "127.0.0.1", None)


def test_values_keep_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(overrides=["total_images=2048"])
    with RunDirectory(tmp_path) as run, Telemetry("train", run="run") as telemetry:
        log = RunLog(config, run, telemetry)

        def shown(name: str, **labels: str) -> float | None:
            return telemetry.registry.get_sample_value(f"dcgan_train_{name}", {**telemetry.identity, **labels})

        for seen, failures in ((512, 2), (1024, 3)):
            log.window(dataclasses.replace(REPORT), seen, mirror=(failures, 60.0 * failures), prefetched=failures)
        assert [shown("loss", network=name) for name in ("discriminator", "generator")] == [1.25, 0.5]
        assert [shown("gradient_norm", network=name) for name in ("discriminator", "generator")] == [3.0, 5.0]
        assert [shown("discriminator_output", batch=name) for name in ("real", "fake")] == [0.75, 0.125]
        assert (shown("sample_diversity_ratio"), shown("seen_images")) == (0.875, 1024)
        assert (shown("nonfinite_steps_total"), shown("mirror_failures_total")) == (2, 3)
        assert (shown("prefetched_images"), shown("mirror_lag_seconds")) == (3, 180)
        assert [shown("phase_seconds_total", phase=name) for name in ("data_wait", "step")] == [4.0, 12.0]
        log.step(0.5)
        assert shown("images_total") == config.recipe.batch
        log.quality({"swd": 9.5, "fid": float("nan")}, 1024)
        assert (shown("quality", metric="swd"), shown("quality", metric="fid")) == (9.5, None)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert lines == [{"images": 512, **VALUES}, {"images": 1024, **VALUES}, {"images": 1024, "swd": 9.5}]
    (timing, _) = [json.loads(line) for line in run.timing.read_text().splitlines()]
    assert timing.pop("time") > 0
    assert timing == {"images": 512, "images_per_second": 64.0, "data_wait_share": 0.25, "step_milliseconds": 250.0}
    assert "512/2,048 images (25%)  64/s  loss D 1.250 G 0.500  D(real) 0.75 D(fake) 0.12" in capsys.readouterr().err
    assert "data wait 25.0%  0:00:24 left" in log._line(REPORT, 512, 64.0, 0.25)


def test_time_for_other_tasks_does_not_slow_the_rate(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run, Telemetry("train", run="run") as telemetry:
        log = RunLog(load_config(overrides=[]), run, telemetry)
        log.stopped({"grid": 1.0, "checkpoint": 3.0}, 256)
        log.window(REPORT, 512)
        log.window(REPORT, 1024)
        log.written(None)
        log.written(Written(7.0, 1e9, 256))

        def shown(name: str, **labels: str) -> float | None:
            return telemetry.registry.get_sample_value(f"dcgan_train_{name}", {**telemetry.identity, **labels})

        phases = [shown("phase_seconds_total", phase=name) for name in ("grid", "evaluate", "checkpoint")]
        assert phases == [1.0, 0.0, 3.0]
        assert shown("checkpoint_duration_seconds") == 3.0
        assert shown("checkpoint_write_duration_seconds") == 7.0
        assert shown("checkpoint_timestamp_seconds") == 1e9
    stopped, *windows = (json.loads(line) for line in run.timing.read_text().splitlines())
    assert stopped.pop("time") > 0
    assert stopped == {"images": 256, "grid_seconds": 1.0, "checkpoint_seconds": 3.0}
    assert [line["images_per_second"] for line in windows] == [128.0, 64.0]


@pytest.mark.parametrize(("flags", "lines"), [("avx2 amx_bf16", 1), ("avx2 avx512_bf16", 1), ("avx2 avx512f", 0)])
def test_a_run_in_float32_on_a_processor_that_multiplies_bf16_is_told(
    flags: str, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "cpuinfo").write_text(f"processor: 0\nflags: {flags}\n\nprocessor: 1\n")
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    preflight.warn(load_config(), Accelerator(cpu=True), from_noise=True)
    assert sum("with --mixed_precision bf16" in record.getMessage() for record in caplog.records) == lines
