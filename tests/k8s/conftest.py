"""Fixtures that render overlays. These tests run in an environment of their own, which tests/k8s/run.sh makes."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from overlays import ROOT, objects

if importlib.util.find_spec("kubernetes_validate") is None:  # the project's own environment
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def render() -> Callable[[str], list[dict[str, Any]]]:
    """Return the objects of an overlay of the repository."""
    return lambda overlay: objects(ROOT / "k8s/overlays" / overlay)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the manifests that a test may break."""
    for folder in ("k8s", "deploy/grafana"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path
