"""dcgan-export as users meet it: what it prints, and one line and a code for everything that is wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from export_cases import HOPPER, Cli, Export

from export.format.card import Card, card_name
from export.samplers.open import open_sampler
from pipeline.common.errors import DataError
from pipeline.common.storage import sha256_file


def assert_refused(result: tuple[int, str, str], code: int, *words: str) -> None:
    found, output, error = result
    assert found == code, error
    assert output == ""
    lines = [line for line in error.splitlines() if not line.startswith("parity:")]
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def test_export_verify_inspect(cli: Cli, exported: Export, tmp_path: Path) -> None:
    code, output, _ = cli(
        "onnx", "--ckpt", exported.checkpoint, "--out", tmp_path, "--max-batch", 8, "--parity-images", 20
    )
    assert code == 0
    assert "parity over 32 images at batch 1, 7, 8" in output
    card = Card.model_validate_json((tmp_path / "model.json").read_text())
    assert sha256_file(tmp_path / "model.onnx") == card.sha256
    assert card.source.images_seen == 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.onnx"], "one file and its card"
    verify = ("verify", tmp_path / "model.onnx", "--ckpt", exported.checkpoint, "--parity-images", 8)
    assert "card and SHA-256" in cli(*verify)[1]
    code, output, _ = cli("inspect", tmp_path / "model.onnx")
    assert code == 0
    assert "z float32 (batch, 100), U(-1, 1)" in output
    assert "opset 19" in output


def test_the_file_asks_for_the_oldest_runtime_that_will_do(exported: Export) -> None:
    import onnx

    model = onnx.load(exported.model)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 19)]
    assert model.ir_version == 9
    assert max(onnx.defs.get_schema(node.op_type, 20).since_version for node in model.graph.node) == 19


def test_the_file_says_what_it_is_without_its_card(exported: Export) -> None:
    model = onnx.load(exported.model)
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert notes["weights_sha256"] == exported.card.source.sha256
    assert json.loads(notes["network"])["image_size"] == 32
    assert b"site-packages" not in exported.model.read_bytes(), "no traces of the machine that exported"


def test_help_loads_no_heavy_library() -> None:
    heavy = "torch", "onnx", "onnxruntime", "openvino", "tensorrt", "matplotlib", "scipy", "numpy"
    code = f"import sys, export.cli; print(*sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_an_edited_file_is_refused_before_it_is_loaded(cli: Cli, copy: Path) -> None:
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    assert_refused(cli("verify", copy), 65, "model.onnx", "SHA-256", "edited or damaged")


def test_a_file_cut_short_is_refused(cli: Cli, copy: Path) -> None:
    copy.write_bytes(copy.read_bytes()[:-100])
    assert_refused(cli("inspect", copy), 65, "cut short", "its card says")


def test_a_file_without_a_card_is_refused(cli: Cli, copy: Path) -> None:
    copy.with_suffix(".json").unlink()
    assert_refused(cli("verify", copy), 65, "has no card beside it", "dcgan-export")


def test_another_files_card_is_refused(cli: Cli, copy: Path) -> None:
    copy.rename(copy.with_name("other.onnx"))
    copy.with_suffix(".json").rename(copy.with_name("other.json"))
    assert_refused(cli("verify", copy.with_name("other.onnx")), 65, "is the card of model.onnx, not of other.onnx")


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not JSON"), ("[]", "version"), ('{"version": 99}', "version 99"), ('{"version": 1}', "required")],
)
def test_a_damaged_card_is_refused(cli: Cli, copy: Path, text: str, words: str) -> None:
    copy.with_suffix(".json").write_text(text)
    assert_refused(cli("inspect", copy), 65, "model.json", words)


def replace_model(copy: Path, model: onnx.ModelProto) -> None:
    """Put another graph in place of the file, with a card that has its hash: only the graph is wrong."""
    onnx.save(model, copy)
    card_path = copy.with_name(card_name(copy.name))
    card = json.loads(card_path.read_text())
    card_path.write_text(json.dumps({**card, "sha256": sha256_file(copy), "bytes": copy.stat().st_size}))


def test_a_static_batch_is_refused(cli: Cli, copy: Path) -> None:
    model = onnx.load(copy)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 8
    replace_model(copy, model)
    assert_refused(cli("verify", copy), 65, "its batch is fixed at 8", "expected a dynamic one")


def test_a_graph_that_is_none_is_refused(cli: Cli, copy: Path) -> None:
    model = onnx.load(copy)
    model.graph.node[1].op_type = "NoSuchOperator"
    replace_model(copy, model)
    assert_refused(cli("verify", copy), 65, "not a valid ONNX graph")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"network": {"latent_distribution": "normal"}}, "another network"),
        ({"network": {"latent_distribution": "normal"}, "input": {"values": "N(0, 1)"}}, "made with network"),
        ({"network": {"width": 16}}, "made with network"),
        ({"network": {"image_size": 64}}, "another network"),
        ({"network": {"channels": 1}}, "another network"),
        ({"output": {"values": "-1 to 1"}}, "another network"),
        ({"precision": "fp16"}, "made with precision fp32, its card says fp16"),
        ({"max_batch": 4096}, "made with max_batch 16, its card says 4096"),
        ({"source": {"sha256": "0" * 64}}, "made with weights_sha256"),
        ({"source": {"kind": "raw"}}, "made with weights_kind ema, its card says raw"),
        ({"source": {"images_seen": 7}}, "made with images_seen 1000, its card says 7"),
        ({"engine": HOPPER.model_dump()}, "names an engine"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_an_edited_card_is_refused(cli: Cli, copy: Path, edit: dict[str, Any], words: str) -> None:
    path = copy.with_suffix(".json")
    card = json.loads(path.read_text())
    for key, value in edit.items():
        card[key] = {**card[key], **value} if isinstance(card.get(key), dict) else value
    path.write_text(json.dumps(card))
    assert_refused(cli("verify", copy), 65, words)
    with pytest.raises(DataError, match=words):
        open_sampler(str(copy))


def test_a_static_batch_is_refused_by_all_that_open_it(cli: Cli, copy: Path, tmp_path: Path) -> None:
    model = onnx.load(copy)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 8
    replace_model(copy, model)
    with pytest.raises(DataError, match="its batch is fixed at 8"):
        open_sampler(str(copy))
    assert_refused(cli("triton", "--model", copy, "--out", tmp_path / "repository"), 65, "its batch is fixed at 8")


def test_weights_are_named_by_the_user_alone(cli: Cli, exported: Export, copy: Path) -> None:
    assert exported.card.source.reference == exported.checkpoint.name, "and no path of the machine that exported"
    assert_refused(cli("verify", copy), 65, exported.checkpoint.name, "--ckpt")
    assert cli("verify", copy, "--ckpt", exported.checkpoint, "--parity-images", 8)[0] == 0


def test_checkpoints_of_others_are_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert_refused(cli("onnx", "--ckpt", tmp_path / "run", "--out", tmp_path), 65, "no finished checkpoint")
    assert_refused(cli("onnx", "--ckpt", tmp_path / "nothing", "--out", tmp_path), 65, "nothing there")
    (tmp_path / "x.pth").write_bytes(b"PK\x03\x04 not a zip")
    assert_refused(cli("onnx", "--ckpt", tmp_path / "x.pth", "--out", tmp_path), 65, "cannot be read")
    (tmp_path / "x.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    assert_refused(cli("onnx", "--ckpt", tmp_path / "x.safetensors", "--out", tmp_path), 65, "not a whole safetensors")
    assert not (tmp_path / "model.onnx").exists()


def test_wrong_options_are_refused(cli: Cli, exported: Export, tmp_path: Path) -> None:
    export = ("onnx", "--ckpt", exported.checkpoint, "--out")
    assert_refused(cli(*export, tmp_path, "--max-batch", 1), 2, "--max-batch 1", "2 to 4096")
    assert_refused(cli(*export, tmp_path, "--name", "model"), 2, "--name model", ".onnx")
    (tmp_path / "file").write_text("")
    assert_refused(cli(*export, tmp_path / "file"), 2, "file", "Not a directory")
    assert_refused(cli("bench", "--out", tmp_path), 2, "give --ckpt, --model, or both")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
