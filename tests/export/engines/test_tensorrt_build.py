"""Engines are really parsed and built, by TensorRT-RTX, which needs no GPU for that; what cannot run is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tensorrt_rtx
from export_cases import HOPPER, SMALL, Cli, Export, make_generator

from export.builders.engine import export_engine, rebuild
from export.builders.onnx_model import build
from export.builders.tensorrt import BuildOptions, build_engine, profiles
from export.format.card import Card, ComputePrecision, Source, ports, read_card
from export.format.driver import driver_version
from export.format.tensorrt_library import load_module, make_logger
from export.samplers.tensorrt import Here, compare
from pipeline.checkpoints.reference import LoadedGenerator
from pipeline.common.errors import DataError, UnavailableError, UsageError
from pipeline.common.storage import sha256_bytes
from pipeline.config import NetworkConfig, load_config, preset_names

RTX = BuildOptions("tensorrt-rtx")
no_gpu = pytest.mark.skipif(driver_version() is not None, reason="needs a machine without an NVIDIA driver")


def onnx_of(config: NetworkConfig, precision: ComputePrecision = "fp32") -> tuple[Card, bytes]:
    """Return a card and graph of a generator of this architecture, without the parity gate."""
    loaded = LoadedGenerator(make_generator(config), config, "test", "0" * 64, None, "raw")
    data = build(loaded, precision, "uint8", 256)
    z, image = ports(config, "uint8")
    return Card(
        file="model.onnx",
        sha256=sha256_bytes(data),
        bytes=len(data),
        precision=precision,
        max_batch=256,
        input=z,
        output=image,
        network=config,
        source=Source(reference="test", sha256="0" * 64, kind="raw"),
        versions={},
    ), data


def network_of_presets() -> list[tuple[str, NetworkConfig]]:
    """Return each architecture among the presets once, under the name of the first that has it."""
    found: dict[NetworkConfig, str] = {}
    for preset in preset_names():
        network = load_config(preset).network
        if not network.label:  # its classes are those of a data set
            found.setdefault(network, preset)
    return [(name, config) for config, name in found.items()]


PRESETS = network_of_presets()


@pytest.mark.parametrize(("preset", "config"), PRESETS, ids=[name for name, _ in PRESETS])
def test_every_preset_builds(preset: str, config: NetworkConfig) -> None:
    card, data = onnx_of(config)
    serialized, engine = build_engine(preset, card, data, RTX)
    assert engine.profiles == [[1, 1, 1], [1, 64, 256]]
    parameters = sum(weight.numel() for weight in make_generator(config).parameters())
    assert len(serialized) > 4 * parameters * 0.9, "a float32 engine holds every weight in four bytes"


@pytest.mark.parametrize("upsampling", ["transposed", "bilinear"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_family_builds(upsampling: str, precision: ComputePrecision) -> None:
    config = NetworkConfig.model_validate({"width": 8, "upsampling": upsampling, "channels": 1, "image_size": 32})
    card, data = onnx_of(config, precision)
    serialized, _ = build_engine("model", card, data, RTX)
    assert len(serialized) > 10_000


def test_the_engine_takes_and_makes_what_the_card_says() -> None:
    trt = load_module("tensorrt-rtx")
    logger = make_logger(trt)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _, data = onnx_of(SMALL)
    assert trt.OnnxParser(network, logger).parse(data), logger.errors
    z, image = network.get_input(0), network.get_output(0)
    assert (network.num_inputs, network.num_outputs) == (1, 1)
    assert (z.name, tuple(z.shape), z.dtype) == ("z", (-1, 100), trt.DataType.FLOAT)
    assert (image.name, tuple(image.shape), image.dtype) == ("image", (-1, 32, 32, 3), trt.DataType.UINT8)


def test_profiles_cover_one_and_many() -> None:
    assert profiles(256) == [[1, 1, 1], [1, 64, 256]]
    assert profiles(16) == [[1, 1, 1], [1, 16, 16]]


def test_a_graph_that_cannot_be_parsed_is_one_line(exported: Export) -> None:
    with pytest.raises(DataError, match=r"tensorrt-rtx cannot parse it: .*Failed to parse"):
        build_engine("model.onnx", exported.card, exported.model.read_bytes()[:5000], RTX)


def test_wrong_levels_are_refused(exported: Export) -> None:
    with pytest.raises(UsageError, match="expected 0 to 5"):
        build_engine("model.onnx", exported.card, b"", BuildOptions("tensorrt-rtx", optimization_level=6))


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_a_timing_cache_is_kept_by_version_and_a_foreign_one_replaced(exported: Export, tmp_path: Path) -> None:
    options = BuildOptions("tensorrt-rtx", timing_cache=tmp_path)
    data = exported.model.read_bytes()
    first, _ = build_engine("model.onnx", exported.card, data, options)
    (cache,) = tmp_path.iterdir()
    assert tensorrt_rtx.__version__ in cache.name
    saved = cache.read_bytes()
    cache.write_bytes(b"of another program" * 9)
    second, _ = build_engine("model.onnx", exported.card, data, options)
    assert cache.read_bytes() == saved
    assert first
    assert second  # a builder need not make the same bytes twice, least of all on a busy machine


def test_trt_command_builds_the_onnx_then_the_engine(cli: Cli, exported: Export, tmp_path: Path) -> None:
    arguments = ("trt", "--ckpt", exported.checkpoint, "--out", tmp_path, "--runtime", "tensorrt-rtx")
    code, output, error = cli(*arguments, "--max-batch", 16, "--parity-images", 8, "--precision", "fp16")
    assert code == 0, error
    assert "engine.plan" in output
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["engine.json", "engine.plan", "model_fp16.json", "model_fp16.onnx"]
    card = read_card(str(tmp_path / "engine.plan"))
    assert card.engine is not None
    assert (card.precision, card.engine.onnx, card.max_batch) == ("fp16", "model_fp16.onnx", 16)
    assert card.source == exported.card.source
    assert "tensorrt-rtx" in cli("inspect", tmp_path / "engine.plan")[1]

    before = (tmp_path / "model_fp16.onnx").stat().st_mtime_ns
    with (tmp_path / "engine.plan").open("r+b") as file:
        file.truncate(card.bytes - 1)
    rebuilt = rebuild(str(tmp_path / "engine.plan"))  # not always the same bytes
    assert rebuilt.model_copy(update={"sha256": card.sha256, "bytes": card.bytes}) == card
    content = (tmp_path / "engine.plan").read_bytes()
    assert (len(content), sha256_bytes(content)) == (rebuilt.bytes, rebuilt.sha256)
    assert read_card(str(tmp_path / "engine.plan")) == rebuilt
    assert (tmp_path / "model_fp16.onnx").stat().st_mtime_ns == before, "the ONNX file was there already"


def test_an_engine_from_an_onnx_file(exported: Export, tmp_path: Path) -> None:
    card = export_engine(str(exported.model), tmp_path, options=RTX)
    assert card.engine is not None
    assert card.engine.onnx_sha256 == exported.card.sha256
    assert (tmp_path / "model.onnx").read_bytes() == exported.model.read_bytes()
    with pytest.raises(UsageError, match="has fp32, and an engine has what its graph has"):
        export_engine(str(exported.model), tmp_path, options=RTX, precision="fp16")


def test_rtx_has_no_timing_cache(exported: Export, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--timing-cache"):
        export_engine(str(exported.model), tmp_path, options=BuildOptions("tensorrt-rtx", timing_cache=tmp_path))


@no_gpu
def test_without_a_gpu_it_says_what_can_be_done(cli: Cli, exported: Export, tmp_path: Path) -> None:
    code, _, error = cli("trt", "--ckpt", exported.checkpoint, "--out", tmp_path / "engine")
    assert code == 69
    assert "no NVIDIA GPU" in error
    assert "--runtime tensorrt-rtx" in error
    assert not (tmp_path / "engine").exists(), "nothing was begun"


@no_gpu
def test_an_engine_without_a_gpu_ends_by_an_exit_code_never_by_a_signal(exported: Export, tmp_path: Path) -> None:
    export_engine(str(exported.model), tmp_path, options=RTX)
    for command in (["verify", "engine.plan"], ["bench", "--model", "engine.plan", "--out", "bench"]):
        done = subprocess.run(
            [sys.executable, "-m", "export.cli", *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 69, done.stderr
        assert "needs an NVIDIA GPU" in done.stderr
        assert "Traceback" not in done.stderr


def test_an_engine_cut_short_is_refused_before_anything_loads_it(cli: Cli, exported: Export, tmp_path: Path) -> None:
    export_engine(str(exported.model), tmp_path, options=RTX)
    engine = tmp_path / "engine.plan"
    engine.write_bytes(engine.read_bytes()[:1000])
    code, _, error = cli("verify", engine)
    assert code == 65
    assert "cut short" in error


@no_gpu
def test_generate_rebuilds_engines_only_and_only_on_a_gpu(exported: Export, tmp_path: Path) -> None:
    export_engine(str(exported.model), tmp_path, options=RTX)
    command = [sys.executable, "-m", "deploy.generate", "--count", "4", "--out", "samples", "--rebuild", "--model"]
    for model, code, words in (("engine.plan", 69, "needs an NVIDIA GPU"), ("model.onnx", 2, "only engines are built")):
        done = subprocess.run([*command, model], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert words in done.stderr


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UnavailableError, match=r"cannot be imported; pip install tensorrt-cu"):
        load_module("tensorrt")


SAME = Here("10.13.3.9", "NVIDIA H200", "9.0", "13.0", "Linux-x86_64")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "11.4.0.106"}, "built by tensorrt 10.13.3.9, installed is 11.4.0.106"),
        ({"gpu": "NVIDIA H100 80GB HBM3"}, "built for NVIDIA H200 .* here is NVIDIA H100"),
        ({"compute_capability": "10.0"}, "here is NVIDIA H200 .10.0"),
        ({"driver": "12.9"}, "here is an older one for 12.9"),
        ({"system": "Linux-aarch64"}, "this is Linux-aarch64"),
    ],
)
def test_an_engine_of_another_machine_does_not_fit(change: dict[str, str], words: str) -> None:
    assert compare(HOPPER, SAME) == (
        [],
        ["tensorrt 10.13.3.9", "Linux-x86_64", "NVIDIA H200", "the driver for CUDA 13.0"],
    )
    (why,), matches = compare(HOPPER, Here(**{**vars(SAME), **change}))
    assert re.search(words, why)
    assert len(matches) == 3


def test_an_rtx_engine_fits_rtx_cards_from_ampere_on_and_no_hopper() -> None:
    rtx = HOPPER.model_copy(update={"runtime": "tensorrt-rtx", "gpu": None, "compute_capability": None, "driver": None})
    assert compare(rtx, Here("10.13.3.9", "NVIDIA RTX 6000 Ada", "8.9", "12.0", "Linux-x86_64"))[0] == []
    for here in (SAME, Here("10.13.3.9", "NVIDIA GeForce RTX 2080 Ti", "7.5", "12.0", "Linux-x86_64")):
        (why,), _ = compare(rtx, here)
        assert "use --runtime tensorrt" in why


def test_the_card_of_an_engine_survives_json(exported: Export) -> None:
    card = exported.card.model_copy(update={"engine": HOPPER})
    assert Card.model_validate(json.loads(card.model_dump_json())) == card
