"""The product uses every package that installing it brings."""

import ast
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

from support import ROOT

PACKAGES = ("pipeline", "export", "deploy")
MODULES = {"pillow": "PIL", "pyyaml": "yaml"}
"""Packages whose module has another name; in all others `-` becomes `_`."""
THROUGH = {"onnxscript": "torch.onnx.export"}
"""Packages that no file imports, and the call of another library that needs them."""


def imported(files: Iterable[Path]) -> set[str]:
    """Return the top-level modules that the files import anywhere, in functions too, and those calls of THROUGH."""
    found = set()
    for path in files:
        text = path.read_text()
        found |= {call for call in THROUGH.values() if f"{call}(" in text}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found


def unused(pyproject: str, files: Iterable[Path]) -> list[str]:
    """Return the packages in the main list of dependencies that no file uses."""
    requirements = tomllib.loads(pyproject)["project"]["dependencies"]
    names = [re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower() for requirement in requirements]
    used = imported(files)
    return [name for name in names if THROUGH.get(name, MODULES.get(name, name.replace("-", "_"))) not in used]


def test_every_dependency_is_used() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert unused((ROOT / "pyproject.toml").read_text(), files) == []


def test_an_unused_dependency_is_found(tmp_path: Path) -> None:
    file = tmp_path / "used.py"
    file.write_text("def late():\n    from PIL.Image import open\n    import numpy.linalg\n# import torch")
    pyproject = '[project]\ndependencies = ["torch>=2", "pillow", "numpy>=2,<3", "onnxscript[x]>=1"]'
    assert unused(pyproject, [file]) == ["torch", "onnxscript"]
