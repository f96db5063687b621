"""docs/environment.md names every environment variable that the programs or the manifests use, and no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT

PAGE = ROOT / "docs" / "environment.md"
LIBRARIES = "## Variables of libraries"
"""Heading of the last section, which names what only libraries read."""

NAME = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*")
USES_ENVIRONMENT = re.compile(r"environ|getenv|\benv=")
OTHER_WORDS = {"NCCL", "RGB", "SPEC", "WEBP"}
"""Strings in capitals that are no variables, in files that use the environment."""


def documented(page: str) -> set[str]:
    """Return the variables in the tables of `page`, up to the section about libraries."""
    rows = [line for line in page.partition(LIBRARIES)[0].splitlines() if line.startswith("|")]
    names = {name for row in rows for name in re.findall(r"`([^`]+)`", row) if NAME.fullmatch(name)}
    return names - {"N"}  # of `--part N`


def in_python(source: str) -> set[str]:
    """Return the strings in capitals of a file that uses the environment."""
    if not USES_ENVIRONMENT.search(source):
        return set()
    strings = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return {text for text in strings if isinstance(text, str) and len(text) > 2 and NAME.fullmatch(text)} - OTHER_WORDS


def in_manifest(text: str) -> set[str]:
    """Return the names under `env:`, in ConfigMaps and Secrets that are generated, and in `$(NAME)`."""
    found = set(re.findall(r"\$\(([A-Z_]+)\)", text))
    for document in yaml.safe_load_all(text):
        for key, value in walk(document):
            if key == "env":
                found |= {entry["name"] for entry in value}
            elif key == "literals":
                found |= {entry.partition("=")[0] for entry in value}
    return found


def walk(value: object) -> Iterator[tuple[str, list[Any]]]:
    """Yield every (key, list) of a YAML document."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, list):
                yield key, inner
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


def in_dockerfile(text: str) -> set[str]:
    """Return what ENV sets."""
    joined = text.replace("\\\n", " ")
    lines = re.findall(r"^ENV (.*)$", joined, re.MULTILINE)
    return {name for line in lines for name in re.findall(r"(?:^|\s)([A-Z_]+)=", line)}


def used() -> dict[str, list[str]]:
    """Return every variable that the code, the manifests and the container use, and where."""
    found: dict[str, list[str]] = {}

    def note(path: Path, names: set[str]) -> None:
        for name in names:
            found.setdefault(name, []).append(str(path.relative_to(ROOT)))

    for package in ("pipeline", "export", "deploy"):
        for path in sorted((ROOT / package).rglob("*.py")):
            note(path, in_python(path.read_text()))
    for path in sorted((ROOT / "k8s").rglob("*.yaml")):
        note(path, in_manifest(path.read_text()))
    scripts = [*(ROOT / "k8s").rglob("*.sh"), *(ROOT / "deploy").rglob("*.sh"), *(ROOT / "deploy").rglob("*.sbatch")]
    for path in sorted(scripts):
        note(path, set(re.findall(r"(?:\$\{(?=[A-Z_]+:?[-=?])|export )([A-Z_]+)", path.read_text())))
    note(ROOT / "deploy" / "Dockerfile", in_dockerfile((ROOT / "deploy" / "Dockerfile").read_text()))
    return found


def test_every_variable_is_documented_and_every_documented_one_is_used() -> None:
    found, named = used(), documented(PAGE.read_text())
    missing = {name: places for name, places in found.items() if name not in named}
    assert missing == {}, "docs/environment.md lacks them; if they are no variables, add them to OTHER_WORDS"
    assert sorted(named - found.keys()) == [], "docs/environment.md names them, and nothing uses them"


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ.get('DCGAN_NEW')",
        "import os\nKEY = 'DCGAN_NEW'\nos.environ[KEY] = '1'",
        "from os import getenv\ngetenv('DCGAN_NEW', '')",
        "import subprocess\nsubprocess.run(['x'], env={'DCGAN_NEW': '1'})",
        "def find(environ): return next(name for name in ('DCGAN_NEW',) if name in environ)",
    ],
)
def test_a_variable_is_found_in_code(source: str) -> None:
    assert in_python(source) == {"DCGAN_NEW"}


def test_a_variable_is_found_in_a_manifest_and_in_the_container() -> None:
    manifest = (
        "containers:\n- args: [--x=$(FROM_ARGS)]\n  env:\n  - {name: FROM_ENV, value: '1'}\n"
        "---\nconfigMapGenerator:\n- name: settings\n  literals: [FROM_MAP=1]\n"
    )
    assert in_manifest(manifest) == {"FROM_ARGS", "FROM_ENV", "FROM_MAP"}
    assert in_dockerfile("FROM x\nENV A_B=1 \\\n    C_D=/tmp/E=2\nRUN E_F=1 true\n") == {"A_B", "C_D"}


def test_the_page_is_read_up_to_the_libraries() -> None:
    page = f"`IN_PROSE`\n| `A_B`, `--option` | `N` |\n{LIBRARIES}\n| `NCCL_DEBUG` |\n"
    assert documented(page) == {"A_B"}
