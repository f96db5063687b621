"""Files that other programs read are valid by those programs' schemas: GitHub's workflows and forms, CITATION.cff."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
SCHEMAS = [
    *((path, "vendor.github-workflows") for path in WORKFLOWS),
    *((path, "custom.github-workflows-require-timeout") for path in WORKFLOWS),
    (GITHUB / "ISSUE_TEMPLATE" / "bug.yml", "vendor.github-issue-forms"),
    (GITHUB / "ISSUE_TEMPLATE" / "proposal.yml", "vendor.github-issue-forms"),
    (GITHUB / "ISSUE_TEMPLATE" / "config.yml", "vendor.github-issue-config"),
    (ROOT / "CITATION.cff", "vendor.citation-file-format"),
]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", MAKEFILE, re.MULTILINE))


def check(schema: str, *files: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("check-jsonschema")), "--builtin-schema", schema]
    return subprocess.run([*command, *map(str, files)], capture_output=True, text=True, check=False)


def steps_of(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize(("path", "schema"), SCHEMAS, ids=lambda value: getattr(value, "name", value))
def test_the_file_is_valid(path: Path, schema: str) -> None:
    done = check(schema, path)
    assert done.returncode == 0, done.stdout


def test_an_invalid_workflow_is_noticed(tmp_path: Path) -> None:
    broken = tmp_path / "test.yml"
    broken.write_text(WORKFLOWS[0].read_text().replace("runs-on:", "runs_on:"))
    assert check("vendor.github-workflows", broken).returncode == 1


def test_the_schemas_cover_every_form() -> None:
    assert {path for path, _ in SCHEMAS} >= {*GITHUB.glob("ISSUE_TEMPLATE/*.yml"), *WORKFLOWS}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_use_major_versions_and_targets_that_exist(workflow: Path) -> None:
    steps = steps_of(workflow)
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    named = {target for step in steps for target in re.findall(r"^make ([a-z-]+)$", step.get("run", ""), re.MULTILINE)}
    assert named
    assert named <= TARGETS


def test_every_supported_python_is_tested() -> None:
    matrix = yaml.safe_load((GITHUB / "workflows" / "test.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text()


def test_every_slow_target_runs_at_night() -> None:
    nightly = yaml.safe_load((GITHUB / "workflows" / "nightly.yml").read_text())["jobs"]["slow"]["strategy"]["matrix"]
    slow = re.search(r"^test-slow: (.*?) ##", MAKEFILE, re.MULTILINE)
    assert slow
    assert set(nightly["target"]) == set(slow[1].split())
