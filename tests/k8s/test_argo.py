"""The WorkflowTemplate for Argo is made of the Jobs of an overlay, fits Argo's own models, and keeps their promises."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from hera.workflows.models import WorkflowTemplate
from overlays import ROOT, objects, variant
from test_schemas import NEWEST, OLDEST, Render, lost

sys.path.insert(0, str(ROOT / "k8s/argo"))
import make_workflow

OVERLAYS = ["cpu-demo", "single-gpu"]


def made(render: Render, overlay: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (the WorkflowTemplate's spec, its templates by name)."""
    spec = make_workflow.make(render(overlay))[-1]["spec"]
    return spec, {template["name"]: template for template in spec["templates"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_argos_own_models_know_every_field(render: Render, overlay: str) -> None:
    *others, workflow = make_workflow.make(render(overlay))
    assert dropped(workflow) == []
    for thing in others:
        for version in (OLDEST, NEWEST):
            kubernetes_validate.validate(thing, version, strict=True)
    assert {"Namespace", "ConfigMap", "PersistentVolumeClaim", "Role", "Service"} <= {t["kind"] for t in others}
    assert "Job" not in {thing["kind"] for thing in others}, "Argo starts the pods"
    workflow["spec"]["templates"][1]["retryStrategy"]["limits"] = 3
    workflow["spec"]["templates"][0]["dag"]["tasks"][0]["dependsOn"] = "x"
    assert [path.rpartition(".")[2] for path in dropped(workflow)] == ["dependsOn", "limits"], (
        "misspelt fields are found"
    )


def dropped(workflow: dict[str, Any]) -> list[str]:
    known = WorkflowTemplate.model_validate(workflow).model_dump(by_alias=True, exclude_none=True, mode="json")
    return lost(workflow, known)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_its_pods_are_those_of_the_jobs(render: Render, overlay: str) -> None:
    spec, templates = made(render, overlay)
    jobs = {thing["metadata"]["name"]: thing["spec"] for thing in render(overlay) if thing["kind"] == "Job"}
    assert list(templates) == ["chain", *[name for name in make_workflow.STEPS if name in jobs]]
    tasks = templates["chain"]["dag"]["tasks"]
    assert [task.get("depends") for task in tasks] == [None, *[f"{task['name']}.Succeeded" for task in tasks[:-1]]]
    for task in tasks:
        job, template = jobs[task["name"]], templates[task["template"]]
        (container,) = job["template"]["spec"]["containers"]
        assert template["container"].items() >= {key: container[key] for key in container if key != "env"}.items()
        pod = {**template, **json.loads(template["podSpecPatch"])}
        others = {"containers", "restartPolicy", "serviceAccountName", "automountServiceAccountToken"}
        for key, value in job["template"]["spec"].items():
            assert key in others or pod[key] == value, key
        assert template["metadata"]["labels"].items() >= job["template"]["metadata"]["labels"].items()
        assert template.get("activeDeadlineSeconds") == job.get("activeDeadlineSeconds")
        indexed = job.get("completionMode") == "Indexed"
        assert task.get("withSequence") == ({"count": str(job["completions"])} if indexed else None)
        assert ("JOB_COMPLETION_INDEX" in str(template["container"].get("env"))) == indexed
    assert (spec["serviceAccountName"], spec["automountServiceAccountToken"]) == ("dcgan", False)


def test_ranks_have_the_names_by_which_they_meet(render: Render) -> None:
    patch = json.loads(made(render, "cpu-demo")[1]["train"]["podSpecPatch"])
    assert (patch["hostname"], patch["subdomain"]) == ("train-{{inputs.parameters.index}}", "ranks")
    (service,) = [thing for thing in make_workflow.make(render("cpu-demo")) if thing["kind"] == "Service"]
    labels = made(render, "cpu-demo")[1]["train"]["metadata"]["labels"]
    assert service["metadata"]["name"] == "ranks"
    assert service["spec"]["selector"].items() <= labels.items()


def test_the_entrypoint_is_that_of_the_image() -> None:
    found = re.search(r"^ENTRYPOINT (\[.*\])$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    assert found is not None
    assert json.loads(found[1]) == make_workflow.ENTRYPOINT


def test_what_it_cannot_run_is_refused_in_one_line(tmp_path: Path) -> None:
    for trainer in ("jobset", "trainjob"):
        overlay = variant(ROOT / "k8s/overlays/multi-node", tmp_path / trainer, [trainer])
        with pytest.raises(ValueError, match=f"remove components/{trainer}"):
            make_workflow.make(objects(overlay))
    with pytest.raises(ValueError, match="kubectl kustomize"):
        make_workflow.make([])
