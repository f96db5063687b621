"""Engines and the files beside them: their reference, what may be replaced, how they are rebuilt."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from export_cases import HOPPER, SMALL, Cli, Export, write_checkpoint

from export.builders import engine as engine_builder
from export.builders.engine import export_engine, find_reference, rebuild
from export.builders.onnx_model import export_onnx
from export.builders.tensorrt import BuildOptions, require_builder
from export.format.card import Card, read_card, write_card
from export.format.tensorrt_library import Gpu
from export.samplers import tensorrt as tensorrt_runtime
from export.samplers.base import Sampler
from export.samplers.onnx import open_onnx
from pipeline.common.errors import DataError, UnavailableError, UsageError

RTX = BuildOptions("tensorrt-rtx")
DRIVERS = (
    "export.builders.tensorrt.driver_version",
    "export.format.tensorrt_library.driver_version",
    "export.samplers.tensorrt.driver_version",
)


@pytest.fixture
def model(exported: Export, tmp_path: Path) -> Path:
    """model.onnx with its card."""
    (tmp_path / "model").mkdir()
    for path in (exported.model, exported.model.with_suffix(".json")):
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "model" / "model.onnx"


@pytest.fixture
def runs_here(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that engines run here: the graph that they were built from runs in their place."""

    def open_engine(name: str, card: Card, data: bytes, batch: int) -> Sampler:
        return open_onnx(name, read_card(str(model)), model.read_bytes(), "onnxruntime", batch, 1)

    monkeypatch.setattr(engine_builder, "can_run", lambda runtime: True)
    monkeypatch.setattr(engine_builder, "PARITY_IMAGES", 8)
    monkeypatch.setattr(tensorrt_runtime, "open_engine", open_engine)


@pytest.fixture
def driver_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """An NVIDIA driver, and a build of PyTorch that cannot use it."""
    for name in DRIVERS:
        monkeypatch.setattr(name, lambda: "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.usefixtures("runs_here")
def test_an_engine_is_compared_with_pytorch_or_else_with_its_onnx_file(exported: Export, model: Path) -> None:
    card = export_engine(str(exported.checkpoint), model.parent, options=RTX, max_batch=16, parity_images=8)
    assert [proven.reference for proven in card.parity] == ["PyTorch"]
    card = export_engine(str(model), model.parent, options=RTX, parity_images=8)
    assert [proven.reference for proven in card.parity] == ["model.onnx"]
    assert [proven.reference for proven in rebuild(str(model.with_name("engine.plan"))).parity] == ["model.onnx"]


@pytest.mark.usefixtures("runs_here")
def test_the_reference_is_found_before_the_build(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after minutes of it."""

    def fail(*_: object) -> None:
        raise UnavailableError("no runtime for the ONNX file")

    monkeypatch.setattr("export.builders.onnx_model.float_runner", fail)
    monkeypatch.setattr(engine_builder, "build_engine", lambda *_: pytest.fail("built in vain"))
    with pytest.raises(UnavailableError, match="no runtime for the ONNX file"):
        export_engine(str(model), model.parent, options=RTX)


def test_weights_that_were_named_must_be_the_right_ones(exported: Export, model: Path, tmp_path: Path) -> None:
    card = export_engine(str(model), model.parent, options=RTX)
    engine = str(model.with_name("engine.plan"))
    assert find_reference(engine, card, str(exported.checkpoint)).name == "PyTorch"
    with pytest.raises(DataError, match="was made from"):
        find_reference(engine, card, str(write_checkpoint(tmp_path, SMALL, seed=1)))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"max_batch": 4096}, "in max_batch: it was edited"),
        ({"precision": "fp16"}, "in precision"),
        ({"network": SMALL.model_copy(update={"latent_distribution": "normal"})}, "in network"),
        ({"source": {"reference": "x", "sha256": "0" * 64, "kind": "raw"}}, "in source"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_the_card_of_an_engine_is_compared_with_its_onnx_file(model: Path, edit: dict[str, object], words: str) -> None:
    card = export_engine(str(model), model.parent, options=RTX)
    edited = Card.model_validate({**card.model_dump(), **edit})
    write_card(str(model.parent), edited)
    engine = str(model.with_name("engine.plan"))
    with pytest.raises(DataError, match=words):
        find_reference(engine, edited, None)
    with pytest.raises(DataError, match=words):
        rebuild(engine)


def test_an_engine_alone_is_compared_with_its_weights(exported: Export, model: Path) -> None:
    """Published without its ONNX file."""
    card = export_engine(str(model), model.parent, options=RTX)
    model.unlink()
    engine = str(model.with_name("engine.plan"))
    assert find_reference(engine, card, str(exported.checkpoint)).name == "PyTorch"
    with pytest.raises(DataError, match="name them with --ckpt"):
        find_reference(engine, card, None)
    edited = card.model_copy(update={"network": SMALL.model_copy(update={"width": 9})})
    with pytest.raises(DataError, match="another network"):
        find_reference(engine, edited, str(exported.checkpoint))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_batch": 32}, "--max-batch 32: .*model.onnx has 16"),
        ({"output": "float"}, "--output float: .*model.onnx has uint8"),
        ({"precision": "fp16"}, "--precision fp16: .*model.onnx has fp32"),
    ],
)
def test_options_that_contradict_the_onnx_file_are_refused(model: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        export_engine(str(model), model.parent, options=RTX, **options)
    export_engine(str(model), model.parent, options=RTX, max_batch=16, output="uint8", precision="tf32")


def test_an_onnx_file_that_another_engine_needs_is_not_replaced(exported: Export, model: Path, tmp_path: Path) -> None:
    """The other engine could not be rebuilt any more."""
    checkpoint = str(exported.checkpoint)
    export_engine(str(model), model.parent, options=RTX, name="first.plan")
    before = model.read_bytes()
    for options in ({"max_batch": 8}, {"max_batch": 16, "output": "float"}):
        with pytest.raises(UsageError, match=r"model\.onnx: first\.plan was built from it"):
            export_engine(checkpoint, model.parent, options=RTX, name="second.plan", parity_images=8, **options)
    other = tmp_path / "other"
    export_onnx(checkpoint, other, max_batch=8, parity_images=8)
    with pytest.raises(UsageError, match=r"first\.plan was built from it"):
        export_engine(str(other / "model.onnx"), model.parent, options=RTX, name="second.plan")
    assert model.read_bytes() == before
    rebuild(str(model.with_name("first.plan")))

    export_engine(str(model), model.parent, options=RTX, name="second.plan")
    model.with_name("second.plan").unlink()
    replaced = export_engine(checkpoint, model.parent, options=RTX, name="first.plan", max_batch=8, parity_images=8)
    assert replaced.max_batch == 8, "the engine that is itself replaced is no hindrance"


@pytest.mark.usefixtures("driver_without_cuda")
def test_a_driver_that_pytorch_cannot_use(model: Path) -> None:
    card = export_engine(str(model), model.parent, options=RTX)
    assert (card.parity, card.engine and card.engine.driver) == ([], "13.0"), "built and kept, not run"
    with pytest.raises(UnavailableError, match="install a CUDA build of PyTorch"):
        require_builder("tensorrt")


def test_the_command_that_a_refusal_prints_rebuilds(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = BuildOptions("tensorrt-rtx", optimization_level=2)
    card = export_engine(str(model), model.parent, options=options, name="a b.plan", precision="tf32")
    for name in DRIVERS:
        monkeypatch.setattr(name, lambda: "13.0")
    monkeypatch.setattr(tensorrt_runtime, "this_gpu", lambda: Gpu("NVIDIA H200", "9.0"))
    with pytest.raises(DataError) as refusal:
        tensorrt_runtime.require_fit(str(model.with_name("a b.plan")), card)
    message = str(refusal.value)
    assert "NVIDIA H200 has 9.0" in message
    assert f"(what fits: tensorrt-rtx {card.engine and card.engine.version}, Linux-" in message, "and what does match"
    monkeypatch.undo()
    command = message.partition("Rebuild it here: ")[2].partition(", or dcgan-generate")[0]
    program, *arguments = shlex.split(command)
    assert program == "dcgan-export"
    path = model.with_name("a b.plan")
    path.unlink()
    code, _, error = cli(*arguments)
    assert code == 0, error
    rebuilt = read_card(str(path))
    assert (rebuilt.precision, rebuilt.engine and rebuilt.engine.optimization_level) == ("tf32", 2)


def test_an_engine_at_a_url_is_not_rebuilt_in_place() -> None:
    with pytest.raises(UsageError, match=r"s3://bucket/engine\.plan is a URL"):
        rebuild("s3://bucket/engine.plan")


def test_a_file_url_is_a_path(model: Path) -> None:
    export_engine(str(model), model.parent, options=RTX)
    assert rebuild(f"file://{model.with_name('engine.plan')}").file == "engine.plan"


@pytest.mark.parametrize(
    ("engine", "words"),
    [({**HOPPER.model_dump(), "driver": "n/a"}, "engine.driver"), (None, "names no engine, expected one")],
)
def test_a_damaged_engine_record_is_refused(model: Path, engine: dict[str, object] | None, words: str) -> None:
    export_engine(str(model), model.parent, options=RTX)
    path = model.with_name("engine.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "engine": engine}))
    with pytest.raises(DataError, match=words):
        read_card(str(path.with_suffix(".plan")))
