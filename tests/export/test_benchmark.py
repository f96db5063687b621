"""The benchmark: what it counts is right, what it measured is written, what it left out is said."""

import json
from pathlib import Path

import pytest
from export_cases import Cli, Export, make_generator

from export.ceilings import work_of
from pipeline.config import NetworkConfig
from pipeline.imaging import open_image


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
        flops = row["images_per_second"] * content["work"]["flops_per_image"]
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


def test_an_unknown_backend_is_refused(cli: Cli, exported: Export, tmp_path: Path) -> None:
    code, _, error = cli("bench", "--ckpt", exported.checkpoint, "--out", tmp_path, "--backend", "tpu")
    assert code == 2
    assert "--backend tpu: expected one of eager, channels_last" in error
