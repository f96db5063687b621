"""The rules of rules.py hold for every overlay, and each rule notices a manifest that breaks it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from overlays import OVERLAYS, ROOT, kustomize
from rules import RULES

Render = Callable[[str], list[dict[str, Any]]]


def problems(objects: list[dict[str, Any]]) -> dict[str, list[str]]:
    found = {check.__name__: list(check(objects)) for check in RULES}
    return {name: messages for name, messages in found.items() if messages}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_keeps_every_rule(render: Render, overlay: str) -> None:
    assert problems(render(overlay)) == {}


MUTATIONS = yaml.safe_load((Path(__file__).parent / "mutations.yaml").read_text())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[f"{m['rule']}-{i}" for i, m in enumerate(MUTATIONS)])
def test_a_broken_rule_is_noticed(copy: Path, mutation: dict[str, str]) -> None:
    path = copy / mutation["file"].format(overlay=mutation["overlay"])
    text = path.read_text()
    assert mutation["before"] in text
    path.write_text(text.replace(mutation["before"], mutation["after"]))
    assert mutation["rule"] in problems(
        list(yaml.safe_load_all(kustomize(copy / "k8s/overlays" / mutation["overlay"])))
    )


def test_every_rule_is_broken_once() -> None:
    assert {mutation["rule"] for mutation in MUTATIONS} == {check.__name__ for check in RULES}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_one_file_holds_every_edit(overlay: str) -> None:
    """Registry, tag, storage class, bucket, keys: nothing that a cluster decides stands anywhere else."""
    folder = ROOT / "k8s/overlays" / overlay
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "edit/kustomization.yaml",
        "kustomization.yaml",
    ]
    for path in [*(ROOT / "k8s").rglob("*.yaml")]:
        if "edit" in path.parts:
            continue
        lines = [line for line in path.read_text().splitlines() if not line.strip().startswith("#")]
        text = "\n".join(line.split(" #")[0] for line in lines)
        assert not re.search(r"newTag|newName|storageClassName|://bucket|AWS_|example\.com", text), path


@pytest.mark.parametrize(("overlay", "last"), [("cpu-demo", "../../components/settings]"), ("multi-node", "")])
def test_jobs_can_wait_in_a_queue(copy: Path, overlay: str, last: str) -> None:
    path = copy / "k8s/overlays" / overlay / "kustomization.yaml"
    text = path.read_text().rstrip()
    assert text.endswith(last or "without it, remove this line")
    path.write_text(text[:-1] + ", ../../components/kueue]" if last else f"{text}\n  - ../../components/kueue\n")
    objects = list(yaml.safe_load_all(kustomize(path.parent)))
    queued = {t["metadata"]["name"] for t in objects if "kueue.x-k8s.io/queue-name" in t["metadata"]["labels"]}
    assert queued == {t["metadata"]["name"] for t in objects if t["kind"] in ("Job", "JobSet")}
    assert {"train", "export", "generate", "generate-merge"} <= queued
    assert problems(objects) == {}
