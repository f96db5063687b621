"""Every program prints its version and completes its options; every file that names the version agrees."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION: str = PROJECT["version"]
PROGRAMS = {
    "train.py": "import runpy; runpy.run_path('pipeline/train.py', run_name='__main__')",
    **{
        name: f"from {entry.split(':')[0]} import {entry.split(':')[1]} as main; main()"
        for name, entry in PROJECT["scripts"].items()
    },
}
HEAVY = ("torch", "onnx", "accelerate", "scipy")

NAMED = {
    "deploy/Dockerfile": (r"-t dcgan:([\d.]+)", r"^ARG VERSION=(\S+)$"),
    "k8s/overlays/cpu-demo/edit/kustomization.yaml": (r"newTag: ([\d.]+)",),
    "k8s/overlays/single-gpu/edit/kustomization.yaml": (r"newTag: ([\d.]+)-cuda",),
    "k8s/overlays/multi-node/edit/kustomization.yaml": (r"newTag: ([\d.]+)-cuda",),
    "docs/operations.md": (r"dcgan:([\d.]+)",),
    "CITATION.cff": (r"^version: (\S+)$",),
    "SECURITY.md": (r"^\| (\d+\.\d+)\.x",),
}
"""Files that name the version, and how: every match of every pattern must be the version, and there must be one."""


def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of this checkout; fail if it imported anything heavy."""
    code = (
        f"import sys; sys.argv={[program, *arguments]!r}\n"
        f"try:\n    {PROGRAMS[program]}\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\nassert not found, found\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_prints_the_version(program: str) -> None:
    done = run(program, "--version")
    assert (done.returncode, done.stdout) == (0, f"dcgan-pipeline {VERSION}\n"), done.stderr


@pytest.mark.parametrize("program", PROJECT["scripts"])
def test_every_command_completes_its_options(program: str) -> None:
    """What the script that `--install-completion` installs asks of the program."""
    variable = f"_{program.upper().replace('-', '_')}_COMPLETE"
    done = run(program, **{variable: "complete_bash", "COMP_WORDS": f"{program} --ver", "COMP_CWORD": "1"})
    assert done.stdout.split() == ["--version"], done.stderr
    assert "--install-completion" in run(program, "--help").stdout


def test_the_installed_package_is_this_version() -> None:
    assert metadata.version("dcgan-pipeline") == VERSION, "pyproject.toml has changed since `make install`"


@pytest.mark.parametrize("file", NAMED)
def test_files_that_name_the_version_agree(file: str) -> None:
    text = (ROOT / file).read_text()
    for pattern in NAMED[file]:
        found = re.findall(pattern, text, re.MULTILINE)
        assert found, f"{file}: nothing matches {pattern}"
        assert all(name == VERSION or VERSION.startswith(f"{name}.") for name in found), f"{file}: {found}"


def test_no_other_file_names_an_image_of_another_version() -> None:
    files = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]
    for folder in ("deploy", "k8s", "tests"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in {".yaml", ".yml", ".sh", ".py"}]
    for path in files:
        found = re.findall(r"\bdcgan:(\d+\.\d+\.\d+)", path.read_text())
        assert set(found) <= {VERSION}, f"{path}: {found}"


def test_the_changelog_has_the_version_as_its_newest_release() -> None:
    headings = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    version, date = headings[1]
    assert version == VERSION
    assert re.fullmatch(r" - \d{4}-\d{2}-\d{2}", date)
