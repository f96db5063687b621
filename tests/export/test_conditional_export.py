"""Conditional models: a second input, parity over every class, the same images from every backend."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_cases import HOPPER, Cli, Export
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as schema

from export.benchmark.roofline import cost_of
from export.builders.engine import export_engine, find_reference
from export.builders.onnx_model import export_onnx
from export.builders.parity import _rows
from export.builders.tensorrt import BuildOptions, batch_profile, profiles
from export.builders.triton import export_repository
from export.format.card import read_card, write_card
from export.format.graph import columns
from export.format.rows import feeds, rows_at
from export.format.tensorrt_library import load_module, make_logger
from export.samplers.open import open_sampler
from export.samplers.tensorrt import input_buffers
from pipeline.checkpoints.weights import serialize
from pipeline.common.errors import DataError, UsageError
from pipeline.common.randomness import Purpose
from pipeline.common.storage import sha256_bytes
from pipeline.config import NetworkConfig
from pipeline.model.labels import draw_labels
from pipeline.model.latents import latents
from pipeline.model.networks import build_generator, initialize
from pipeline.model.sampling import images_of

CLASSES: dict[str, dict[str, Any]] = {
    "digit": {"label": ["digit"], "classes": ["0", "1", "7"]},
    "male,bald": {"label": ["male", "bald"], "classes": ["00", "10", "11"]},
}
CASES = [
    ("digit", "concat"),
    ("male,bald", "projection"),
    pytest.param(("digit", "projection"), marks=pytest.mark.slow),
    pytest.param(("male,bald", "concat"), marks=pytest.mark.slow),
]
BACKENDS = [("checkpoint", "eager"), ("checkpoint", "channels_last"), ("model", "onnxruntime"), ("model", "openvino")]


def make_conditional(label: str, conditioning: str) -> Any:
    """Return a tiny generator whose images differ by their label."""
    values = {"image_size": 32, "width": 4, "latent_dim": 6, "channels": 1, "class_images": [500, 100, 400]}
    generator: Any = build_generator(
        NetworkConfig.model_validate({**values, **CLASSES[label], "conditioning": conditioning})
    )
    initialize(generator, 1, lane=0)
    torch.manual_seed(0)
    for module in generator.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.Linear):
            for value in [*module.parameters(), *module.buffers()]:
                if value.is_floating_point():
                    torch.nn.init.uniform_(value, 0.2, 1.5)
    with torch.no_grad():
        z = torch.from_numpy(latents(0, Purpose.BATCHNORM, 0, 64, 6))
        images = generator.eval()(z, torch.from_numpy(draw_labels(generator.config, 0, Purpose.BATCHNORM, 0, 64)))
        last = next(layer for layer in reversed(generator.layers) if hasattr(layer, "weight"))
        last.weight *= 0.5 / torch.atanh(images.double()).std().float()
    return generator


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def conditional(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A conditional generator as model.onnx. Read only."""
    folder = tmp_path_factory.mktemp("conditional")
    generator = make_conditional(*request.param)
    checkpoint = folder / "generator.safetensors"
    checkpoint.write_bytes(serialize(generator, generator.config, "ema", 0))
    card = export_onnx(str(checkpoint), folder, max_batch=16, parity_images=48)
    return Export(checkpoint, folder / "model.onnx", card, generator)


def test_the_graph_has_a_second_input_that_card_and_metadata_name(conditional: Export, cli: Cli) -> None:
    network, graph = conditional.generator.config, onnx.load(conditional.model).graph
    assert [value.name for value in graph.input] == ["z", "label"]
    kind = graph.input[1].type.tensor_type
    label = read_card(str(conditional.model)).label
    assert label is not None
    if len(network.label) > 1:
        assert (kind.elem_type, len(kind.shape.dim)) == (onnx.TensorProto.FLOAT, 2)
        assert (label.dtype, label.shape) == ("float32", ["batch", 2])
        assert label.values == "0 or 1 for each of male, bald"
    else:
        assert (kind.elem_type, len(kind.shape.dim)) == (onnx.TensorProto.INT64, 1)
        assert (label.dtype, label.shape) == ("int64", ["batch"])
        assert label.values == "class of digit: 0 0, 1 1, 2 7"
    named = {entry.key: entry.value for entry in onnx.load(conditional.model).metadata_props}
    assert json.loads(named["classes"]) == list(network.class_titles)
    assert all(parity.batches == [1, 7, 16] for parity in conditional.card.parity)
    assert {parity.backend.split("/")[0] for parity in conditional.card.parity} == {"onnxruntime", "openvino"}
    code, _, error = cli("verify", conditional.model, "--ckpt", conditional.checkpoint, "--parity-images", 48)
    assert code == 0, error
    assert "label" in cli("inspect", conditional.model)[1]


@pytest.mark.parametrize(("kind", "backend"), BACKENDS)
def test_every_class_is_that_of_the_network(conditional: Export, kind: str, backend: str) -> None:
    network = conditional.generator.config
    z = np.repeat(latents(4, Purpose.SAMPLE, 0, 5, 6), len(network.classes), axis=0)
    numbers = np.tile(np.arange(len(network.classes)), 5)
    if len(network.label) > 1:
        values = np.array([[0, 0], [1, 0], [1, 1]], np.float32)[numbers]
    else:
        values = np.eye(3, dtype=np.float32)[numbers]
    expected = images_of(conditional.generator, z, values).astype(int)
    with open_sampler(str(getattr(conditional, kind)), backend=backend, batch=4, threads=1) as sampler:
        found = sampler.sample(z, labels=numbers)
        assert np.abs(found - expected).max() <= 1
        assert np.abs(found[:3].astype(int) - found[[1, 2, 0]]).mean(axis=(1, 2, 3)).min() > 2, "the label decides"
        titles = network.class_titles
        assert np.array_equal(found, sampler.sample(z, labels=[titles[number] for number in numbers]))
        one = sampler.sample(z[:5], labels=titles[2])
        assert np.array_equal(one, sampler.sample(z[:5], labels=[2] * 5))
        if len(network.label) > 1:
            assert np.array_equal(found, sampler.sample(z, labels=values))
            half = np.float32(0.5) * values
            expected = images_of(conditional.generator, z, half).astype(int)
            assert np.abs(sampler.sample(z, labels=half) - expected).max() <= 1, "between two classes"
        drawn = np.concatenate([images for _, images in sampler.sample_range(9, 3, 8)])
        rows = rows_at(network, 9, Purpose.SAMPLE, 3, 8)
        classes = rows[:, 6:] if len(network.label) > 1 else rows[:, 6].astype(int)
        assert np.array_equal(drawn, sampler.sample(rows[:, :6], labels=classes))


def test_a_client_without_labels_and_labels_that_are_not_there_are_one_line(conditional: Export) -> None:
    several = len(conditional.generator.config.label) > 1
    z = latents(0, Purpose.SAMPLE, 0, 2, 6)
    with open_sampler(str(conditional.model), backend="onnxruntime", batch=4) as sampler:
        cases: list[tuple[Any, str]] = [
            (None, "pass labels=, one for each row of z"),
            ("hat", "label 'hat': the model has no such class"),
            ([0, 3], "expected the numbers of classes, 0 to 2"),
            ([0.5, 1.0], "expected the numbers of classes"),
            ([0], r"expected \(2, 2\)" if several else r"expected \(2,\), one for each row of z"),
        ]
        for labels, words in cases:
            with pytest.raises(UsageError, match=words) as refused:
                sampler.sample(z, labels=labels)
            assert "\n" not in str(refused.value)
        assert len(sampler.sample(z, labels="male+bald" if several else "7")) == 2


def test_labels_for_a_model_without_them_are_refused(exported: Export) -> None:
    with (
        open_sampler(str(exported.model), backend="onnxruntime", batch=4) as sampler,
        pytest.raises(UsageError, match="not conditioned on a label; leave them out"),
    ):
        sampler.sample(np.zeros((1, 100), np.float32), labels=[0])


def test_parity_compares_every_class_and_the_benchmark_its_own_draw(conditional: Export) -> None:
    network = conditional.generator.config
    rows = _rows(network, 2, 7)
    assert len(np.unique(rows[:3, 6:], axis=0)) == 3
    assert np.array_equal(rows[1:3, 6:], _rows(network, 3, 2)[:, 6:])
    assert cost_of(conditional.generator).flops_per_image > 0


@pytest.mark.slow
def test_the_benchmark_measures_a_conditional_model(conditional: Export, cli: Cli, tmp_path: Path) -> None:
    code, _, error = cli(
        *("bench", "--ckpt", conditional.checkpoint, "--model", conditional.model, "--out", tmp_path, "--quick"),
        *("--batch", 4, "--backend", "channels_last", "--backend", "onnxruntime", "--rounds", 3, "--threads", 1),
    )
    assert code == 0, error
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {row["backend"] for row in rows} == {"channels_last", "onnxruntime"}
    assert all(row["images_per_second"] > 0 for row in rows)


def test_triton_serves_the_label(conditional: Export, cli: Cli, tmp_path: Path) -> None:
    code, _, error = cli("triton", "--model", conditional.model, "--out", tmp_path)
    assert code == 0, error
    (path,) = tmp_path.rglob("config.pbtxt")
    config: Any = text_format.Parse(path.read_text(), schema.ModelConfig())
    label = config.input[1]
    if len(conditional.generator.config.label) > 1:
        assert (label.name, label.data_type, list(label.dims)) == ("label", schema.TYPE_FP32, [2])
        assert not label.HasField("reshape")
    else:
        assert (label.name, label.data_type, list(label.dims)) == ("label", schema.TYPE_INT64, [1])
        assert list(label.reshape.shape) == [], "a number an image, in the graph"
        assert label.HasField("reshape")
    assert all({*warm.inputs} == {"z", "label"} for warm in config.model_warmup)


def test_an_engine_reads_the_label_too(conditional: Export, tmp_path: Path) -> None:
    """What TensorRT parses, the profiles that its builder takes, and the engine that TensorRT-RTX builds of them."""
    trt = load_module("tensorrt-rtx")
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse(conditional.model.read_bytes()), logger.errors
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    several = len(conditional.generator.config.label) > 1
    label = ((-1, 2), trt.DataType.FLOAT) if several else ((-1,), trt.DataType.INT64)
    found = {tensor.name: (tuple(tensor.shape), tensor.dtype) for tensor in inputs}
    assert found == {"z": ((-1, 6), trt.DataType.FLOAT), "label": label}
    for batches in profiles(16):
        profile = batch_profile(builder, conditional.card, batches)
        for name, (shape, _) in found.items():
            assert [tuple(size) for size in profile.get_shape(name)] == [(batch, *shape[1:]) for batch in batches]
    made = export_engine(str(conditional.model), tmp_path, options=BuildOptions("tensorrt-rtx"))
    assert made.label == conditional.card.label
    assert read_card(str(tmp_path / "engine.plan")) == made
    for edited in (
        made.model_copy(update={"label": None}),
        made.model_copy(update={"network": made.network.model_copy(update={"classes": made.network.classes[::-1]})}),
    ):
        write_card(str(tmp_path), edited)
        with pytest.raises(DataError, match=r"in label|in network|describes another network"):
            find_reference(str(tmp_path / "engine.plan"), edited, None)


@pytest.mark.parametrize("batch", [1, 5])
def test_an_engines_inputs_are_those_of_the_graph(conditional: Export, batch: int) -> None:
    """A single row's slices are contiguous where they lie, but an engine wants memory of its own for each input."""
    rows = rows_at(conditional.card.network, 3, Purpose.SAMPLE, 2, batch)
    z = torch.from_numpy(rows)
    buffers = input_buffers(conditional.card, z)
    for name, values in columns(conditional.card.network, z).items():
        buffers[name].copy_(values)
    expected = feeds(conditional.card.network, rows)
    assert buffers.keys() == expected.keys()
    for name, values in buffers.items():
        assert values.is_contiguous()
        assert not {values.data_ptr()} & {z.data_ptr(), z[0, 6:].data_ptr()}
        assert values.numpy().dtype == expected[name].dtype
        assert np.array_equal(values.numpy(), expected[name])


def test_triton_serves_the_label_of_an_engine(conditional: Export, tmp_path: Path) -> None:
    (tmp_path / "engine.plan").write_bytes(b"plan")
    named = {"file": "engine.plan", "sha256": sha256_bytes(b"plan"), "bytes": 4}
    card = conditional.card.model_copy(update={**named, "engine": HOPPER})
    write_card(str(tmp_path), card)
    path = export_repository(str(tmp_path / "engine.plan"), tmp_path / "repository")
    config: Any = text_format.Parse(path.read_text(), schema.ModelConfig())
    assert config.backend == "tensorrt"
    assert [tensor.name for tensor in config.input] == ["z", "label"]
    assert config.input[1].HasField("reshape") is (len(card.network.label) == 1)
    assert list(config.instance_group[0].profile) == ["0", "1"]


def test_an_edited_card_is_refused(conditional: Export, tmp_path: Path) -> None:
    for path in (conditional.model, conditional.model.with_suffix(".json")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    turned = conditional.card.network.model_copy(update={"classes": conditional.card.network.classes[::-1]})
    write_card(str(tmp_path), conditional.card.model_copy(update={"network": turned}))
    with pytest.raises(DataError, match=r"describes another network|card was edited"):
        open_sampler(str(tmp_path / "model.onnx"))
    write_card(str(tmp_path), conditional.card.model_copy(update={"label": None}))
    with pytest.raises(DataError, match="its card says"):
        open_sampler(str(tmp_path / "model.onnx"))
