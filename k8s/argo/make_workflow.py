"""Print an overlay as an Argo WorkflowTemplate: the same pods, in a DAG that Argo runs, repeats and shows.

kubectl kustomize k8s/overlays/cpu-demo | python k8s/argo/make_workflow.py | kubectl apply -f -

The Jobs of the overlay are the only source: pods, numbers of parts, limits, and the exit codes after which nothing is
tried again. Each index of an Indexed Job becomes a task of its own (withSequence), with the name and the variable that
Kubernetes would give it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
STEPS = ("data", "data-merge", "train", "export", "generate", "generate-merge")
ENTRYPOINT = ["env", "--block-signal=TERM,INT", "dcgan-launch"]  # of deploy/Dockerfile: Argo would ask the registry
FIELDS = (
    "affinity",
    "nodeSelector",
    "priorityClassName",
    "securityContext",
    "tolerations",
    "volumes",
    "initContainers",
)
COMPONENT = "app.kubernetes.io/component"

Object = dict[str, Any]


def make(objects: list[Object]) -> list[Object]:
    """Return what to apply: the overlay's base and Services, what Argo's executor may do, and the WorkflowTemplate.

    Raises ValueError if the overlay trains by a JobSet or a TrainJob, or has no Job.
    """
    for kind in {thing["kind"] for thing in objects} & {"JobSet", "TrainJob"}:
        raise ValueError(
            f"found a {kind}, expected a Job: remove components/{kind.lower()} from the overlay, Argo repeats ranks"
        )
    jobs = {thing["metadata"]["name"]: thing for thing in objects if thing["kind"] == "Job"}
    steps = [name for name in STEPS if name in jobs]
    if not steps:
        raise ValueError("found no Job; expected the output of: kubectl kustomize k8s/overlays/NAME")
    namespace = jobs[steps[0]]["metadata"]["namespace"]
    owners = [(thing, thing["metadata"].get("labels", {}).get(COMPONENT)) for thing in objects]
    kept = [thing for thing, step in owners if step == "base" or (step in steps and thing["kind"] == "Service")]
    executor = list(yaml.safe_load_all((HERE / "executor.yaml").read_text()))
    for thing in executor:
        thing["metadata"]["namespace"] = namespace
    tasks = [task(jobs[name], after) for name, after in zip(steps, [None, *steps], strict=False)]
    workflow = {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "WorkflowTemplate",
        "metadata": {
            "name": "dcgan",
            "namespace": namespace,
            "labels": {"app.kubernetes.io/part-of": "dcgan", COMPONENT: "base"},
        },
        "spec": {
            "entrypoint": "chain",
            "serviceAccountName": "dcgan",
            "automountServiceAccountToken": False,
            "executor": {"serviceAccountName": "dcgan-argo"},
            "ttlStrategy": {"secondsAfterCompletion": 604800},
            "templates": [{"name": "chain", "dag": {"tasks": tasks}}, *[template(jobs[name]) for name in steps]],
        },
    }
    return [*kept, *executor, workflow]


def task(job: Object, after: str | None) -> Object:
    """Return a Job's place in the DAG: once for each index, when the step `after` is done."""
    made: Object = {"name": job["metadata"]["name"], "template": job["metadata"]["name"]}
    if after is not None:
        made["depends"] = f"{after}.Succeeded"
    if job["spec"].get("completionMode") == "Indexed":
        made["withSequence"] = {"count": str(job["spec"]["completions"])}
        made["arguments"] = {"parameters": [{"name": "index", "value": "{{item}}"}]}
    return made


def template(job: Object) -> Object:
    """Return a Job's pod as a template of Argo."""
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    if "command" not in container:
        container = {**container, "command": list(ENTRYPOINT)}
    patch = {key: pod[key] for key in ("terminationGracePeriodSeconds", "enableServiceLinks")}
    labels = dict(spec["template"]["metadata"]["labels"])
    made: Object = {"name": name}
    if spec.get("completionMode") == "Indexed":
        made["inputs"] = {"parameters": [{"name": "index"}]}
        index = {"name": "JOB_COMPLETION_INDEX", "value": "{{inputs.parameters.index}}"}
        container = {**container, "env": [*container.get("env", []), index]}
        if "subdomain" in pod:  # ranks meet at train-0.ranks, and the Service selects by this label
            patch |= {"hostname": name + "-{{inputs.parameters.index}}", "subdomain": pod["subdomain"]}
            labels["batch.kubernetes.io/job-name"] = name
    made |= {"metadata": {"labels": labels}, "retryStrategy": retry(spec), "podSpecPatch": json.dumps(patch)}
    if "activeDeadlineSeconds" in spec:
        made["activeDeadlineSeconds"] = spec["activeDeadlineSeconds"]
    return made | {key: pod[key] for key in FIELDS if key in pod} | {"container": container}


def retry(spec: Object) -> Object:
    """Return a Job's failure policy in Argo's words: its final codes never again, all else up to the Job's limit.

    A pod that was lost, and one whose initContainer failed, is an Error to Argo, which then knows no exit code.
    """
    rules = [rule for rule in spec["podFailurePolicy"]["rules"] if rule["action"] in ("FailJob", "FailIndex")]
    final = sorted({code for rule in rules for code in rule["onExitCodes"]["values"]})
    return {
        "limit": spec.get("backoffLimitPerIndex", spec.get("backoffLimit", 6)),
        "retryPolicy": "Always",
        "expression": f"lastRetry.status == 'Error' || !(asInt(lastRetry.exitCode) in {final})",
        "backoff": {"duration": "10s", "factor": 2, "cap": "2m"},
    }


def main() -> None:
    """Read the rendered overlay from standard input."""
    try:
        made = make([thing for thing in yaml.safe_load_all(sys.stdin) if thing])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(yaml.safe_dump_all(made, sort_keys=False, width=120), end="")


if __name__ == "__main__":
    main()
