"""What records say of the machine and of the packages that did the work."""

import sys
from importlib import metadata
from types import ModuleType

import pytest

from pipeline.common.machine import imported_versions, processor


def test_versions_are_those_of_what_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", ModuleType("openvino"))
    found = imported_versions()
    assert found["openvino"] == metadata.version("openvino")
    assert found["numpy"] == metadata.version("numpy")
    assert found["dcgan-pipeline"] == metadata.version("dcgan-pipeline")
    assert "onnxruntime" not in found, "installed, but it did nothing"
    assert not {"pytest", "ruff", "mypy", "pluggy"} & set(found)


def test_without_the_metadata_of_the_project_every_import_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert {"numpy", "pytest"} <= set(imported_versions())


def test_the_processor_has_a_name() -> None:
    assert processor().strip()
