"""The rules of rules.py hold for every overlay, and each rule notices a manifest that breaks it."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from overlays import OVERLAYS, ROOT, objects, variant
from rules import RULES, containers, of

Render = Callable[[str], list[dict[str, Any]]]


def problems(things: list[dict[str, Any]]) -> dict[str, list[str]]:
    found = {check.__name__: list(check(things)) for check in RULES}
    return {name: messages for name, messages in found.items() if messages}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_keeps_every_rule(render: Render, overlay: str) -> None:
    assert problems(render(overlay)) == {}


@pytest.mark.parametrize("trainer", ["", "jobset", "trainjob"])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_so_does_every_combination_with_components(tmp_path: Path, overlay: str, trainer: str) -> None:
    source = ROOT / "k8s/overlays" / overlay
    has_data = "../../data" in yaml.safe_load((source / "kustomization.yaml").read_text())["resources"]
    others = ["metrics", "priority", "kueue"] + ["index"] * has_data
    for chosen in itertools.chain(*(itertools.combinations(others, count) for count in range(len(others) + 1))):
        added = [*(name for name in chosen if name != "kueue"), *[trainer] * bool(trainer), *{"kueue"} & set(chosen)]
        found = objects(variant(source, tmp_path / "-".join(added or ["none"]), added, without=("jobset", "metrics")))
        spare = {"every_setting_is_used"} if "index" in chosen else set()  # SOURCE_KIND, ENCODING
        assert set(problems(found)) <= spare, added
        kinds = {thing["kind"] for thing in found if thing["metadata"]["name"] == "train"}
        assert kinds == {"jobset": {"JobSet"}, "trainjob": {"TrainJob", "TrainingRuntime"}}.get(trainer, {"Job"})
        assert bool(of(found, "PodMonitor")) == ("metrics" in chosen)
        queued = {
            t["metadata"]["name"] for t in found if "kueue.x-k8s.io/queue-name" in t["metadata"].get("labels", {})
        }
        work = {t["metadata"]["name"] for t in of(found, "Job", "JobSet", "TrainJob")}
        assert queued == (work if "kueue" in chosen else set())
        assert {"train", "export", "generate", "generate-merge"} <= work


MUTATIONS = yaml.safe_load((Path(__file__).parent / "mutations.yaml").read_text())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[f"{m['rule']}-{i}" for i, m in enumerate(MUTATIONS)])
def test_a_broken_rule_is_noticed(copy: Path, mutation: dict[str, Any]) -> None:
    path = copy / mutation["file"].format(overlay=mutation["overlay"])
    text = path.read_text()
    assert mutation["before"] in text
    path.write_text(text.replace(mutation["before"], mutation["after"]))
    overlay = copy / "k8s/overlays" / mutation["overlay"]
    if "components" in mutation:
        overlay = variant(overlay, copy / "k8s/overlays/variant", mutation["components"])
    assert mutation["rule"] in problems(objects(overlay))


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


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_an_edit_file_shows_in_comments_works(copy: Path, overlay: str) -> None:
    """A registry that needs a password, and an image by its digest."""
    path = copy / "k8s/overlays" / overlay / "edit/kustomization.yaml"
    lines = path.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if "A registry that needs a password" in line)
    lines[start + 1 : start + 4] = [line.replace("# ", "", 1) for line in lines[start + 1 : start + 4]]
    lines = [line.replace("# patches:", "patches:") for line in lines]
    digest = "sha256:" + "ab" * 32
    lines = [re.sub(r"newTag: 0\.1\.0[\w-]*", f"digest: '{digest}'", line) for line in lines]
    path.write_text("\n".join(lines))
    found = objects(path.parents[1])
    (account,) = of(found, "ServiceAccount")
    assert account["imagePullSecrets"] == [{"name": "registry"}]
    assert problems(found) == {}
    images = {container["image"] for _, _, container in containers(found)}
    assert any(image.endswith(f"dcgan@{digest}") for image in images)
    assert not any("dcgan:" in image for image in images)
