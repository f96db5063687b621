"""The benchmark: what it counts is right, what it measured is written, what it left out is said."""

import json
from pathlib import Path

import pytest
from export_cases import Cli, Export, make_generator

from export.benchmark import roofline as ceilings
from export.benchmark.cases import Subject, choose_subjects
from export.benchmark.report import make_rows
from export.benchmark.roofline import Ceiling, work_of
from export.benchmark.run import Timing
from export.format.card import Precision
from pipeline.common.imaging import open_image
from pipeline.config import NetworkConfig


def test_the_work_of_an_image_is_counted() -> None:
    """The tutorials' width 64: by hand, 2 * inputs * outputs * kernel^2 * input pixels a transposed convolution."""
    work = work_of(make_generator(NetworkConfig(width=64)))
    maps = [(100, 512, 1), (512, 256, 4), (256, 128, 8), (128, 64, 16), (64, 3, 32)]
    assert work.flops_per_image == sum(2 * i * o * 16 * side**2 for i, o, side in maps)
    assert work.values_per_image == sum(o * size**2 for (_, o, _), size in zip(maps, (4, 8, 16, 32, 64), strict=True))
    assert work.bytes_per_image(1) > work.bytes_per_image(256) > 8 * work.values_per_image


def test_bench_writes_what_it_measured(cli: Cli, exported: Export, tmp_path: Path) -> None:
    code, output, error = cli(
        *("bench", "--ckpt", exported.checkpoint, "--model", exported.model, "--out", tmp_path, "--quick"),
        *("--batch", 1, "--batch", 8, "--rounds", 3, "--threads", 1),
    )
    assert code == 0, error
    content = json.loads((tmp_path / "bench.json").read_text())
    measured = {(row["backend"], row["batch"]) for row in content["rows"]}
    backends = {"eager", "eager, again", "channels_last", "openvino", "onnxruntime"}
    assert {(backend, batch) for backend in backends for batch in (1, 8)} <= measured
    for row in content["rows"]:
        flops = row["images_per_second"] * row["flops_per_image"]
        assert row["gflops_per_second"] == pytest.approx(flops / 1e9, abs=0.1)
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        if row["backend"] == "eager":
            assert row["times_eager"] == 1
    assert "compiled" in content["left_out"]
    assert "not measured: compiled" in output
    assert "images/s" in output
    assert content["hardware"]["threads"] == "1 threads"
    assert open_image((tmp_path / "bench.png").read_bytes()).width > 500


def test_bench_makes_the_onnx_file_it_needs(cli: Cli, exported: Export, tmp_path: Path) -> None:
    code, _, error = cli(
        *("bench", "--ckpt", exported.checkpoint, "--out", tmp_path, "--quick", "--batch", 4),
        *("--backend", "onnxruntime", "--rounds", 3),
    )
    assert code == 0, error
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [(row["backend"], row["batch"], row["times_eager"]) for row in rows] == [("onnxruntime", 4, None)]


def test_a_batch_that_a_model_does_not_take_is_left_out(cli: Cli, exported: Export, tmp_path: Path) -> None:
    """And nothing that was measured before it is lost."""
    code, output, error = cli(
        *("bench", "--ckpt", exported.checkpoint, "--model", exported.model, "--out", tmp_path, "--quick"),
        *("--batch", 4, "--batch", 32, "--backend", "eager", "--backend", "onnxruntime"),
    )
    assert code == 0, error
    content = json.loads((tmp_path / "bench.json").read_text())
    measured = {(row["backend"], row["batch"]) for row in content["rows"]}
    assert measured == {("eager", 4), ("eager, again", 4), ("onnxruntime", 4), ("eager", 32), ("eager, again", 32)}
    assert "takes at most 16 images" in content["left_out"]["onnxruntime, batch 32"]
    assert "not measured: onnxruntime, batch 32" in output
    assert [(limit["device"], limit["precision"]) for limit in content["ceilings"]] == [("cpu", "fp32")]


def test_a_damaged_model_is_left_out_or_refused(cli: Cli, exported: Export, copy: Path, tmp_path: Path) -> None:
    copy.write_bytes(copy.read_bytes()[:-1])
    arguments = ("bench", "--model", copy, "--out", tmp_path / "bench", "--quick", "--batch", 1)
    code, _, error = cli(*arguments)
    assert code == 65
    assert "cut short" in error
    code, output, error = cli(*arguments, "--ckpt", exported.checkpoint)
    assert code == 0, error
    assert "cut short" in output


def test_each_row_is_judged_by_its_own_device_and_arithmetic() -> None:
    small, large = NetworkConfig(width=8, image_size=32), NetworkConfig(width=8)
    subjects = [
        Subject("eager", "run", "eager", small, "fp32", "cuda"),
        Subject("tensorrt named fp16", "a.plan", "tensorrt", small, "tf32", "cuda"),
        Subject("tensorrt", "b.plan", "tensorrt", small, "fp16", "cuda"),
        Subject("openvino", "c.onnx", "openvino", large, "fp32", "cpu"),
    ]
    limits: dict[tuple[str, Precision], Ceiling] = {
        ("cuda", "fp32"): Ceiling(1e9, 1e9),
        ("cuda", "tf32"): Ceiling(2e9, 1e9),
        ("cuda", "fp16"): Ceiling(4e9, 1e9),
        ("cpu", "fp32"): Ceiling(1e8, 1e8),
    }
    timings = {
        (subject.label, 8): Timing(rates=[200.0], latencies=[0.04], device_seconds=[0.001] * 98 + [0.1] * 2)
        for subject in subjects
    }
    rows = {row["backend"]: row for row in make_rows(subjects, timings, limits)}
    eager, tf32, fp16, openvino = (rows[subject.label] for subject in subjects)
    assert eager["percent_of_compute"] == pytest.approx(2 * tf32["percent_of_compute"], abs=2)
    assert eager["percent_of_compute"] == pytest.approx(4 * fp16["percent_of_compute"], abs=4)
    assert eager["percent_of_memory"] == pytest.approx(2 * fp16["percent_of_memory"], abs=2)
    assert openvino["flops_per_image"] == work_of(make_generator(large)).flops_per_image > eager["flops_per_image"]
    assert openvino["percent_of_compute"] == round(100 * 200 * openvino["flops_per_image"] / 1e8)
    assert (eager["times_eager"], openvino["times_eager"]) == (1, None), "another network is no comparison"
    assert eager["device_p50_ms"] == 1 < eager["device_p99_ms"]


def test_a_ceiling_is_the_best_of_several_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 9.0, 3.0, 2.0, 4.0])
    clock = [0.0]
    monkeypatch.setattr("export.benchmark.roofline.time.perf_counter", lambda: clock[0])

    def action() -> None:
        clock[0] += next(seconds)

    assert ceilings._seconds(action, "cpu") == 2.0, "the first only warms up"


def test_fp16_has_one_row_a_module(exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager in fp16 would be channels_last in fp16 under another name."""
    monkeypatch.setattr("export.benchmark.cases._has_cuda", lambda: True)
    _, left_out = choose_subjects(str(exported.checkpoint), [], [], quick=True)
    assert {"channels_last fp16", "cuda-graphs fp16"} <= set(left_out)
    assert "eager fp16" not in left_out


def test_an_unknown_backend_is_refused(cli: Cli, exported: Export, tmp_path: Path) -> None:
    code, _, error = cli("bench", "--ckpt", exported.checkpoint, "--out", tmp_path, "--backend", "tpu")
    assert code == 2
    assert "--backend tpu: expected one of eager, channels_last" in error
