"""Rendering overlays with kustomize. These tests run in an environment of their own: tests/k8s/run.sh."""

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = sorted(path.name for path in (ROOT / "k8s/overlays").iterdir())

if importlib.util.find_spec("kubernetes_validate") is None:  # the project's own environment
    collect_ignore_glob = ["test_*.py"]


@cache
def kustomize(folder: Path) -> str:
    """Return what `kubectl apply -k` would send."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def render() -> Callable[[str], list[dict[str, Any]]]:
    """Return the objects of an overlay of the repository."""
    return lambda overlay: list(yaml.safe_load_all(kustomize(ROOT / "k8s/overlays" / overlay)))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the manifests that a test may break."""
    for folder in ("k8s", "deploy/grafana"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path
