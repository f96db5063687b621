"""The Triton repository: parsed by Triton's own schema, equal to the model's card."""

from pathlib import Path
from typing import Any

import pytest
from export_cases import HOPPER, Cli, Export
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as schema

from export.builders.triton import check_config, export_repository, make_config
from export.format.card import Card, read_card, write_card
from pipeline.common.errors import DataError, UnavailableError, UsageError
from pipeline.common.storage import sha256_file


def parse(path: Path) -> Any:
    return text_format.Parse(path.read_text(), schema.ModelConfig())


def engine_of(exported: Export, folder: Path, runtime: str = "tensorrt") -> Path:
    """Write a file that passes for an engine: the repository copies it and reads only its card."""
    path = folder / "engine.plan"
    path.write_bytes(b"plan")
    engine = HOPPER.model_copy(update={"runtime": runtime, "profiles": [[1, 1, 1], [1, 16, 16]]})
    card = exported.card.model_copy(
        update={"file": path.name, "sha256": sha256_file(path), "bytes": 4, "engine": engine}
    )
    write_card(str(folder), card)
    return path


def test_an_onnx_model(cli: Cli, exported: Export, tmp_path: Path) -> None:
    code, output, error = cli("triton", "--model", exported.model, "--out", tmp_path, "--name", "faces")
    assert code == 0, error
    assert "parsed by Triton's schema, equal to the card" in output
    config = parse(tmp_path / "faces" / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("faces", "onnxruntime", 16)
    ((z, image),) = [(config.input[0], config.output[0])]
    assert (z.name, z.data_type, list(z.dims)) == ("z", schema.TYPE_FP32, [100])
    assert (image.name, image.data_type, list(image.dims)) == ("image", schema.TYPE_UINT8, [32, 32, 3])
    assert config.HasField("dynamic_batching")
    assert [warm.batch_size for warm in config.model_warmup] == [1, 16]
    model = tmp_path / "faces" / "1" / "model.onnx"
    assert model.read_bytes() == exported.model.read_bytes()
    assert read_card(str(model)).sha256 == exported.card.sha256, "the copy is as good as the original"


def test_an_engine(exported: Export, tmp_path: Path) -> None:
    path = export_repository(str(engine_of(exported, tmp_path)), tmp_path / "repository", instances=2)
    config = parse(path)
    assert config.backend == "tensorrt"
    assert list(config.dynamic_batching.preferred_batch_size) == [16]
    group = config.instance_group[0]
    assert (group.count, group.kind, list(group.profile)) == (2, schema.ModelInstanceGroup.KIND_GPU, ["0", "1"])
    assert config.optimization.cuda.graphs
    assert (path.parent / "1" / "model.plan").read_bytes() == b"plan"


def test_the_threads_of_a_model_on_the_cpu(cli: Cli, exported: Export, tmp_path: Path) -> None:
    options = ["triton", "--model", exported.model, "--out", tmp_path, "--instances", 2]
    code, _, error = cli(*options, "--threads", 5)
    assert code == 0, error
    assert parse(tmp_path / "dcgan" / "config.pbtxt").parameters["intra_op_thread_count"].string_value == "2"
    code, _, error = cli(*options, "--threads", 1, "--name", "few")
    assert (code, error.count("\n")) == (2, 1)
    assert "--threads 1: expected at least one for each of 2 --instances" in error
    assert not (tmp_path / "few").exists()


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "-x", "a/b", "../up", ""])
def test_a_name_stays_inside_the_repository(exported: Export, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="--name"):
        export_repository(str(exported.model), tmp_path / "repository", name=name)
    assert not (tmp_path / "repository").exists()


def test_triton_has_no_rtx_backend(exported: Export, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no tensorrt-rtx backend; use the ONNX file"):
        export_repository(str(engine_of(exported, tmp_path, "tensorrt-rtx")), tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def altered(card: Card, old: str, new: str) -> str:
    text = make_config(card, "dcgan", 1, 500)
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("max_batch_size", "max_batch_sizes", "no field named"),
        ("TYPE_UINT8", "TYPE_BYTE", "no value|no enum"),
        ("[ 32, 32, 3 ]", "[ 3, 32, 32 ]", "the card of model.onnx says"),
        ("TYPE_UINT8", "TYPE_FP32", "the card of model.onnx says"),
        ("max_batch_size: 16", "max_batch_size: 32", "has .32"),
    ],
)
def test_a_configuration_that_is_wrong_is_found(exported: Export, old: str, new: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        check_config(altered(exported.card, old, new), exported.card)
