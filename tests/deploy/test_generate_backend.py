"""The backend of `auto` holds for a whole generation, whatever its machines are."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.generation import manifest as manifest_module
from deploy.generation.manifest import PLAN
from deploy.generation.plan import Plan
from export.builders.onnx_model import export_onnx
from export.format.speeds import ProcessorSpeeds, add_speeds
from pipeline.common.machine import available_threads, instructions, processor_kind
from pipeline.common.storage import Store

Run = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def exported(make_model: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model.onnx whose speed table is written by `prefer`."""
    folder = tmp_path_factory.mktemp("exported")
    export_onnx(str(make_model(0)), folder, max_batch=64, parity_images=8)
    return folder / "model.onnx"


def prefer(model: Path, backend: str) -> None:
    """Let `backend` be the fastest on this processor."""
    add_speeds(
        str(model),
        ProcessorSpeeds(
            processor=processor_kind(),
            instructions=instructions(),
            threads=available_threads(),
            date="2026-11-28",
            versions={},
            images_per_second={64: {backend: 2.0}},
        ),
    )


@pytest.mark.parametrize("layout", ["shards", "folder"])
def test_parts_take_the_backend_of_the_one_that_began(run: Run, exported: Path, tmp_path: Path, layout: str) -> None:
    options = ["--model", exported, "--count", 40, "--shard-images", 8, "--layout", layout, "--out", tmp_path / "out"]
    prefer(exported, "onnxruntime")
    out, _ = run(*options, "--part", "0/2", "--batch", 16)
    assert "backend onnxruntime: the fastest here at blocks of 16, by " in out
    prefer(exported, "openvino")  # as on another processor
    out, _ = run(*options, "--part", "1/2")
    assert "backend onnxruntime, 16 images a block: as this generation was begun" in out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["plan"]["backend"], manifest["plan"]["block_images"]) == ("onnxruntime", 16)
    assert [made["provider"] for made in manifest["made_by"]] == ["CPUExecutionProvider"]
    run(*options)  # finished
    _, error = run(*options, "--backend", "openvino", code=78)  # who names another is refused, as ever
    assert "backend onnxruntime != openvino" in error


def test_of_two_that_begin_at_once_one_gives_way(
    run: Run, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found no plan; the other's was written last."""
    options = ["--model", exported, "--count", 40, "--shard-images", 8, "--out", tmp_path / "out", "--part", "0/2"]
    prefer(exported, "onnxruntime")
    real = manifest_module.begin

    def begin(store: Store, plan: Plan) -> bool:
        finished = real(store, plan)
        other = json.loads(store.read(PLAN)) | {"backend": "openvino"}
        store.write(PLAN, json.dumps(other).encode())
        return finished

    monkeypatch.setattr(manifest_module, "begin", begin)
    _, error = run(*options, code=75)
    assert "another part began at the same moment" in error
    assert not list((tmp_path / "out").glob("*.tar"))
    monkeypatch.undo()
    run(*options)
    run(*options[:-1], "1/2")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["plan"]["backend"] == "openvino"


def test_a_backend_that_is_missing_here_is_named_with_the_generation(
    run: Run, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--model", exported, "--count", 40, "--shard-images", 8, "--out", tmp_path / "out"]
    prefer(exported, "onnxruntime")
    run(*options, "--part", "0/2")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    _, error = run(*options, "--part", "1/2", code=69)
    assert "was begun with --backend onnxruntime: " in error
    assert "needs ONNX Runtime: pip install onnxruntime" in error
