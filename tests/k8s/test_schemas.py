"""Every field of the core objects, the custom resources and the Dockerfile exists and has the right type."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from overlays import OVERLAYS, ROOT, kustomize, objects, variant
from rules import job_sets

Render = Callable[[str], list[dict[str, Any]]]
OLDEST, NEWEST = "1.34", "1.37"  # podReplacementPolicy with podFailurePolicy is stable from 1.34 on
CUSTOM = {"PodMonitor", "PrometheusRule", "JobSet", "TrainJob", "TrainingRuntime"}

# Reviewed: checks of checkov that we do not follow, and why.
NOT_FOLLOWED = {
    "CKV_K8S_15": "imagePullPolicy Always: tags are pinned, and nodes without a registry must be able to start",
    "CKV_K8S_35": "secrets as files: fsspec's object stores read their keys from the environment",
    "CKV_K8S_43": "images by digest: only who pushes the image knows it; edit/kustomization.yaml takes one",
    "CKV_K8S_8": "liveness probes: Jobs end when they fail; a stalled one is seen by alert and deadline",
    "CKV_K8S_9": "readiness probes: nothing sends requests to Jobs",
}


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_core_objects_fit_their_schemas(render: Render, tmp_path: Path, overlay: str, version: str) -> None:
    found = render(overlay) + custom(tmp_path, overlay)
    found += objects(variant(ROOT / "k8s/overlays" / overlay, tmp_path / "priority", ["priority"], without=[]))
    checked = 0
    for thing in found:
        if thing["kind"] not in CUSTOM:
            kubernetes_validate.validate(thing, version, strict=True)
            checked += 1
    for name, spec in job_sets(found):
        for job in spec["replicatedJobs"]:
            metadata = {"name": name, **job["template"].get("metadata", {})}
            inside = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job["template"]["spec"]}
            kubernetes_validate.validate(inside, version, strict=True)
            checked += 1
    assert checked > 12


def custom(folder: Path, overlay: str = "multi-node") -> list[dict[str, Any]]:
    """Return an overlay's objects of all kinds that are not Kubernetes' own, trained by a JobSet and by a TrainJob."""
    found = []
    for trainer in ("jobset", "trainjob"):
        found += objects(variant(ROOT / "k8s/overlays" / overlay, folder / trainer, ["metrics", trainer, "kueue"]))
    return [thing for thing in found if thing["kind"] in CUSTOM]


def test_custom_resources_fit_their_models(tmp_path: Path) -> None:
    found = custom(tmp_path)
    assert {thing["kind"] for thing in found} == CUSTOM
    for thing in found:
        assert dropped_by_model(thing) == []


def dropped_by_model(thing: dict[str, Any]) -> list[str]:
    """Return the fields that a custom resource's model does not know: it drops misspelt ones without a word."""
    import cloudcoil.models.prometheus_operator.v1 as operator
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
    from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
    from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime

    models = {
        "PodMonitor": operator.PodMonitor,
        "PrometheusRule": operator.PrometheusRule,
        "JobSet": JobsetV1alpha2JobSet,
        "TrainJob": TrainerV1alpha1TrainJob,
        "TrainingRuntime": TrainerV1alpha1TrainingRuntime,
    }
    thing = without_quantities(thing)
    model = models[thing["kind"]].model_validate(thing)
    return lost(thing, json.loads(model.model_dump_json(by_alias=True, exclude_none=True, exclude_unset=True)))


def without_quantities(value: Any) -> Any:
    """Leave out quantities: JobSet's model takes them for objects. As part of a Job they are checked above."""
    if isinstance(value, dict):
        return {k: without_quantities(v) for k, v in value.items() if k not in ("resources", "sizeLimit")}
    return [without_quantities(item) for item in value] if isinstance(value, list) else value


def lost(before: Any, after: Any, path: str = "") -> list[str]:
    """Return the paths of what is in `before` but not in `after`."""
    if isinstance(before, dict):
        return [
            problem
            for key, value in before.items()
            for problem in ([f"{path}.{key}"] if key not in (after or {}) else lost(value, after[key], f"{path}.{key}"))
        ]
    if isinstance(before, list):
        return [problem for old, new in zip(before, after, strict=True) for problem in lost(old, new, f"{path}[]")]
    return []


@pytest.mark.parametrize(
    ("kind", "path", "field"),
    [
        ("JobSet", ["spec", "failurePolicy"], "maxRestarts"),
        ("PodMonitor", ["spec", "podMetricsEndpoints", 0], "interval"),
        ("PrometheusRule", ["spec", "groups", 0, "rules", -1], "annotations"),
        ("TrainJob", ["spec", "trainer"], "numNodes"),
        ("TrainingRuntime", ["spec"], "mlPolicy"),
        ("TrainingRuntime", ["spec", "template", "spec", "replicatedJobs", 0, "template", "spec"], "podFailurePolicy"),
    ],
)
def test_misspelt_fields_of_custom_resources_are_found(tmp_path: Path, kind: str, path: list[Any], field: str) -> None:
    thing = next(thing for thing in custom(tmp_path) if thing["kind"] == kind)
    inside = thing
    for step in path:
        inside = inside[step]
    inside[field + "s"] = inside.pop(field)
    assert [name.rpartition(".")[2] for name in dropped_by_model(thing)] == [field + "s"]


def test_checkov_finds_nothing_else(tmp_path: Path) -> None:
    files = []
    for overlay in OVERLAYS:
        path = tmp_path / f"{overlay}.yaml"
        path.write_text(kustomize(ROOT / "k8s/overlays" / overlay))
        files += ["-f", str(path)]
    results = checkov("kubernetes", *files)
    failed = {check["check_id"] for check in results["results"]["failed_checks"]}
    assert failed <= set(NOT_FOLLOWED), failed
    assert results["summary"]["passed"] > 500


def test_the_dockerfile_passes_hadolint_and_checkov() -> None:
    path = str(ROOT / "deploy/Dockerfile")
    hadolint = subprocess.run(
        [str(Path(sys.executable).with_name("hadolint")), path], capture_output=True, text=True, check=False
    )
    assert (hadolint.returncode, hadolint.stdout) == (0, "")
    failed = {check["check_id"] for check in checkov("dockerfile", "-f", path)["results"]["failed_checks"]}
    assert failed <= {"CKV_DOCKER_7"}  # "latest" in FROM: it does not follow ARG BASE_IMAGE, which is pinned


def checkov(framework: str, *arguments: str) -> dict[str, Any]:
    command = [str(Path(sys.executable).with_name("checkov")), "--framework", framework, "--skip-download"]
    done = subprocess.run([*command, "--output", "json", *arguments], capture_output=True, text=True, check=False)
    results = json.loads(done.stdout)
    assert results["results"]["parsing_errors"] == []
    return dict(results)


def test_the_rules_are_those_of_the_repository() -> None:
    folder = ROOT / "k8s/components/metrics"
    # In a process of its own: hera, which test_argo.py imports, changes how PyYAML writes text.
    command = [sys.executable, "-c", "import make_rule; print(make_rule.make(), end='')"]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert (folder / "prometheus-rule.yaml").read_text() == made, "run: python k8s/components/metrics/make_rule.py"


def test_the_image_has_what_the_demo_names(render: Render) -> None:
    settings = next(t["data"] for t in render("cpu-demo") if t["metadata"]["name"].startswith("settings-"))
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    assert f"COPY data/faces {settings['DATA']}\n" in dockerfile
    preset = ROOT / "pipeline/presets" / f"{settings['PRESET']}.yaml"
    assert yaml.safe_load(preset.read_text())["recipe"]["batch"] * int(settings["NODES"]) == int(settings["BATCH"])
