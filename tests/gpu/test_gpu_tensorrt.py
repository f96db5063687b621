"""On an NVIDIA GPU with TensorRT: engines are built, run and checked for parity, and refused on other GPUs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_cases import Weights

from export.builders.engine import export_engine, rebuild, rebuild_unless_it_fits, verify_engine
from export.builders.onnx_model import export_onnx
from export.builders.tensorrt import BuildOptions
from export.format.card import Output, Precision, RuntimeName, read_card
from export.format.driver import driver_version
from export.format.tensorrt_library import RTX_CAPABILITIES, load_module, this_gpu
from export.samplers.open import open_sampler
from pipeline.checkpoints.weights import serialize
from pipeline.common.errors import DataError, UnavailableError
from pipeline.common.randomness import Purpose
from pipeline.config import NetworkConfig
from pipeline.model.labels import label_values
from pipeline.model.latents import latents
from pipeline.model.networks import build_generator, initialize
from pipeline.model.sampling import images_of

FLOAT_BARS = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2}
SHARE_BARS = {"fp32": 0.005, "tf32": 0.2, "fp16": 0.2}


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def runtime(request: pytest.FixtureRequest) -> RuntimeName:
    """Each TensorRT that is installed and knows this GPU."""
    if request.param == "tensorrt-rtx" and this_gpu().compute_capability not in RTX_CAPABILITIES:
        pytest.skip(f"not possible: TensorRT-RTX does not run on {this_gpu()}")
    try:
        load_module(request.param)
    except UnavailableError as error:
        pytest.skip(str(error))
    name: RuntimeName = request.param
    return name


@pytest.mark.parametrize("output", ["uint8", "float"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_engines_are_equal(
    weights: Weights, tmp_path: Path, runtime: RuntimeName, precision: Precision, output: Output
) -> None:
    card = export_engine(
        str(weights.path),
        tmp_path,
        precision=precision,
        output=output,
        options=BuildOptions(runtime, timing_cache=tmp_path / "cache" if runtime == "tensorrt" else None),
        parity_images=1024,
    )
    (proven,) = card.parity
    assert proven.batches == [1, 7, 256]
    assert proven.max_uint8_error <= 1
    assert (proven.max_float_error is None) == (output == "uint8")
    assert (proven.max_float_error or 0) <= FLOAT_BARS[precision]
    assert proven.share_of_pixels_off <= SHARE_BARS[precision], "float32 that is TF32 shows in 3 % of the pixels"

    for batch in (1, 7, 256):
        z = latents(5, Purpose.SAMPLE, 0, 3 * batch + 1, 100)
        with torch.no_grad():
            floats = weights.generator(torch.from_numpy(z)).numpy()
        pixels = np.clip(floats.transpose(0, 2, 3, 1) * 127.5 + 128, 0, 255).astype(int)
        with open_sampler(str(tmp_path / "engine.plan"), batch=batch) as sampler:
            assert sampler.backend == "tensorrt"
            images = sampler.sample(z)
            assert np.abs(images - pixels).max() <= 1
            assert np.array_equal(images, sampler.sample(z)), "the same bytes the second time"
            assert len(sampler.time_launches(5)) == 5
    assert verify_engine(str(tmp_path / "engine.plan"), images=256)[0] == card


LABELS = {"digit": ["0", "1", "7"], "male,bald": ["00", "10", "11"]}


@pytest.mark.parametrize("label", LABELS)
def test_an_engine_of_a_conditional_network_makes_every_class(tmp_path: Path, runtime: RuntimeName, label: str) -> None:
    values = {"width": 16, "label": label.split(","), "classes": LABELS[label], "class_images": [5, 1, 4]}
    generator: Any = build_generator(NetworkConfig.model_validate(values))
    initialize(generator, 0, lane=0)
    torch.manual_seed(0)
    for module in generator.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight)
    generator.layers[-2].weight.data *= 20
    path = tmp_path / "generator.safetensors"
    path.write_bytes(serialize(generator.eval(), generator.config, "raw", 0))
    card = export_engine(str(path), tmp_path, max_batch=64, options=BuildOptions(runtime), parity_images=256)
    assert [(proven.batches, proven.max_uint8_error <= 1) for proven in card.parity] == [([1, 7, 64], True)]
    classes = np.arange(70) % 3
    z = latents(5, Purpose.SAMPLE, 0, 70, 100)
    expected = images_of(generator, z, label_values(generator.config, classes)).astype(int)
    for batch in (1, 7, 64):
        with open_sampler(str(tmp_path / "engine.plan"), batch=batch) as sampler:
            assert np.abs(sampler.sample(z, labels=classes) - expected).max() <= 1
            assert np.abs(sampler.sample(z, labels=(classes + 1) % 3) - expected).mean() > 2, "the label decides"


def test_an_engine_of_another_machine_is_refused_and_rebuilt(
    weights: Weights, tmp_path: Path, runtime: RuntimeName
) -> None:
    export_engine(str(weights.path), tmp_path, max_batch=8, options=BuildOptions(runtime), parity_images=8)
    engine, path = tmp_path / "engine.plan", tmp_path / "engine.json"
    card = json.loads(path.read_text())
    card["engine"]["version"] = "10.0.0.1"
    path.write_text(json.dumps(card))
    with pytest.raises(DataError, match=r"built by .* 10\.0\.0\.1, installed is .* Rebuild it here"):
        open_sampler(str(engine))
    assert rebuild_unless_it_fits(str(engine))
    assert not rebuild_unless_it_fits(str(engine))
    rebuilt = read_card(str(engine))
    assert rebuilt.engine is not None
    assert rebuilt.engine.version == load_module(runtime).__version__
    assert rebuilt.engine.driver == driver_version()
    open_sampler(str(engine)).close()


def test_an_engine_is_built_where_only_the_onnx_file_is(weights: Weights, tmp_path: Path, runtime: RuntimeName) -> None:
    """The machine with the GPU need not have the checkpoint: the ONNX file, proven equal, stands in."""
    checkpoint = tmp_path / "generator.safetensors"
    checkpoint.write_bytes(weights.path.read_bytes())
    export_onnx(str(checkpoint), tmp_path, max_batch=8, parity_images=8)
    checkpoint.unlink()
    card = export_engine(str(tmp_path / "model.onnx"), tmp_path, options=BuildOptions(runtime), parity_images=8)
    assert [proven.reference for proven in card.parity] == ["model.onnx"]
    assert rebuild(str(tmp_path / "engine.plan")).parity[0].reference == "model.onnx"


def test_a_batch_outside_the_profile_is_refused(weights: Weights, tmp_path: Path, runtime: RuntimeName) -> None:
    export_engine(str(weights.path), tmp_path, max_batch=8, options=BuildOptions(runtime), parity_images=8)
    with pytest.raises(Exception, match="takes at most 8 images"):
        open_sampler(str(tmp_path / "engine.plan"), batch=9)


def test_engines_of_one_process_do_not_disturb_each_other(
    weights: Weights, tmp_path: Path, runtime: RuntimeName
) -> None:
    """Two samplers at once, each with its own context, streams and graph."""
    export_engine(str(weights.path), tmp_path, max_batch=64, options=BuildOptions(runtime), parity_images=64)
    z = latents(5, Purpose.SAMPLE, 0, 128, 100)
    with open_sampler(str(tmp_path / "engine.plan"), batch=64) as one:
        alone = one.sample(z)
        with open_sampler(str(tmp_path / "engine.plan"), batch=1) as other:
            blocks = (z[start : start + 64] for start in (0, 64))
            mixed = []
            for images in one.stream(blocks):
                mixed.append(images)
                other.sample(z[:2])
    assert np.array_equal(np.concatenate(mixed), alone)
