"""Data flows one way: no file imports from a room above its own, and no two files import each other in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from rooms import ROOMS
from support import ROOT

PACKAGES = ("pipeline", "export", "deploy")

MOST_FILES = 16
"""Python files in a folder."""


def modules(root: Path) -> dict[str, Path]:
    """Return every module of the product by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of ours that a file imports anywhere, in functions and for the type checker too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in known else node.module


def room(module: str) -> int | None:
    """Return the place of a module's room in ROOMS; the packages' own __init__ lie below all of them."""
    if module in PACKAGES:
        return -1
    return next((place for place, name in enumerate(ROOMS) if f"{module}.".startswith(f"{name}.")), None)


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports that go up."""
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if (here := room(module)) is None or (there := room(other)) is None or there > here
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one circle in order, or nothing."""
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if found := visit(other, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in graph if (found := visit(module, []))), [])


def import_graph(root: Path) -> dict[str, set[str]]:
    known = modules(root)
    return {module: set(imports(path, known)) - {module} for module, path in known.items()}


def test_nothing_imports_upward() -> None:
    assert upward(import_graph(ROOT)) == []


def test_nothing_imports_in_a_circle() -> None:
    assert circle(import_graph(ROOT)) == []


def test_no_folder_is_crowded() -> None:
    others = [path for room in ("tests", "benchmarks") for path in (ROOT / room).rglob("*.py")]
    folders = [path.parent for path in (*modules(ROOT).values(), *others)]
    assert {str(folder): folders.count(folder) for folder in folders if folders.count(folder) > MOST_FILES} == {}


@pytest.mark.parametrize(
    "planted",
    [
        "import pipeline.training.loop",
        "def late() -> None:\n    from pipeline.data import dataset",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pipeline.config import RunConfig",
    ],
)
def test_an_import_that_goes_up_is_found(planted: str, tmp_path: Path) -> None:
    write(tmp_path, {"pipeline/common/errors.py": planted, "pipeline/config.py": "", "pipeline/data/dataset.py": ""})
    write(tmp_path, {"pipeline/training/loop.py": ""})
    assert [found.split()[0] for found in upward(import_graph(tmp_path))] == ["pipeline.common.errors"]


def test_a_circle_is_found(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "export/format/card.py": "from export.format import graph",
            "export/format/graph.py": "def late():\n    from export.format.driver import driver_version",
            "export/format/driver.py": "from export.format.card import Card",
        },
    )
    names = ["export.format.card", "export.format.graph", "export.format.driver", "export.format.card"]
    assert circle(import_graph(tmp_path)) == names


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
        for folder in list(path.relative_to(root).parents)[:-1]:
            (root / folder / "__init__.py").touch()
