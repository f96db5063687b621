"""Conditional models: a second input, parity over every class, the same images from every backend."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_cases import Cli, Export
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as schema

from export.benchmark.roofline import cost_of
from export.builders.engine import export_engine
from export.builders.onnx_model import export_onnx
from export.builders.parity import _rows
from export.builders.tensorrt import BuildOptions
from export.format.card import read_card, write_card
from export.format.rows import rows_at
from export.samplers.open import open_sampler
from pipeline.checkpoints.weights import serialize
from pipeline.common.errors import DataError, UnavailableError, UsageError
from pipeline.common.randomness import Purpose
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


def test_an_engine_is_refused(conditional: Export, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx", exc_type=ImportError)
    for reference in (conditional.checkpoint, conditional.model):
        with pytest.raises(UnavailableError, match="TensorRT engines read z alone"):
            export_engine(str(reference), tmp_path, options=BuildOptions("tensorrt-rtx"))
    assert not list(tmp_path.iterdir())


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
