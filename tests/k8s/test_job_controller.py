"""What Job, JobSet and Argo do at each exit code is what docs/operations.md says: our manifests, under their rules.

tests/deploy/test_exit_codes.py compares the launcher, the programs and the job scripts for Slurm with the same tables.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from exit_codes import DISRUPTED, limits, promises
from job_controller import ArgoStep, Job, JobSet, verdict
from overlays import OVERLAYS, ROOT, objects, variant
from rules import job_sets, of, settings
from test_schemas import Render

sys.path.insert(0, str(ROOT / "k8s/argo"))
import make_workflow

Object = dict[str, Any]


def how(code: int) -> dict[str, Any]:
    """Return how a pod ends by `code`. Whatever a pod that is taken away returns, its condition decides."""
    return {"code": 65, "conditions": ["DisruptionTarget"]} if code == DISRUPTED else {"code": code}


def one(spec: Object) -> Object:
    """Return a Job's spec with one index: what the others do does not change the verdict."""
    return {**spec, "completions": 1, "parallelism": 1}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_job_does_what_the_page_says(render: Render, overlay: str) -> None:
    jobs = of(render(overlay), "Job")
    assert len(jobs) >= 3
    for thing in jobs:
        for code, promised in promises("Job").items():
            found = verdict(lambda spec=one(thing["spec"]): Job(spec), **how(code))  # type: ignore[misc]
            assert found == promised, f"{thing['metadata']['name']} at {code}"


@pytest.mark.parametrize("trainer", ["jobset", "trainjob"])
def test_a_job_set_does_what_the_page_says(tmp_path: Path, trainer: str) -> None:
    """Also the one that a TrainJob makes of its runtime."""
    ((_, spec),) = job_sets(objects(variant(ROOT / "k8s/overlays/multi-node", tmp_path / "variant", [trainer])))
    (replicated,) = spec["replicatedJobs"]
    replicated["template"]["spec"] = one(replicated["template"]["spec"])
    for code, promised in promises("JobSet").items():
        assert verdict(lambda: JobSet(spec), **how(code)) == promised, code


@pytest.mark.parametrize("overlay", ["cpu-demo", "single-gpu"])
def test_argo_does_what_the_page_says(render: Render, overlay: str) -> None:
    templates = make_workflow.make(render(overlay))[-1]["spec"]["templates"][1:]
    assert len(templates) >= 4
    for template in templates:
        for code, promised in promises("Argo").items():
            found = verdict(lambda t=template: ArgoStep(t["retryStrategy"]), **how(code))  # type: ignore[misc]
            assert found == promised, f"{template['name']} at {code}"


def seconds(text: str, values: dict[str, str]) -> int | None:
    """Return a duration of the page: `7 days`, a setting, or no limit."""
    if text == "no limit":
        return None
    if text.startswith("`"):
        return int(values[text.strip("`")])
    number, unit = text.split()
    return int(number) * {"hours": 3600, "days": 86400, "day": 86400}[unit]


def limited(render: Render) -> Iterator[tuple[str, Object, dict[str, str]]]:
    for overlay in OVERLAYS:
        found = render(overlay)
        for thing in of(found, "Job"):
            yield thing["metadata"]["name"], thing["spec"], settings(found)


def test_its_limits_are_those_of_the_page(render: Render) -> None:
    seen = set()
    for name, spec, values in limited(render):
        seen.add(name)
        assert int(limits("`again` at most")[name]) == Job(spec).limit, name
        counted = "each index" if Job(spec).by_index else "all its pods"
        assert limits("counted over")[name] == counted, name
        assert seconds(limits("may take")[name], values) == spec.get("activeDeadlineSeconds"), name
        assert seconds(limits("stays for")[name], values) == spec["ttlSecondsAfterFinished"], name
    (job_set,) = of(render("multi-node"), "JobSet")
    assert int(limits("`again` at most")["train, JobSet"].replace(",", "")) == JobSet(job_set["spec"]).limit
    assert seconds(limits("stays for")["train, JobSet"], {}) == job_set["spec"]["ttlSecondsAfterFinished"]
    assert seen == set(limits("may take")) - {"train, JobSet"}


def test_one_index_that_fails_lets_the_others_go_on_unless_all_are_needed(render: Render) -> None:
    jobs = {thing["metadata"]["name"]: thing["spec"] for thing in of(render("multi-node"), "Job")}
    data, generate = Job(jobs["data"]), Job(jobs["generate"])
    data.end(65, index=3)
    assert data.reason == "MaxFailedIndexesExceeded"
    generate.end(65, index=3)
    for index in set(range(jobs["generate"]["completions"])) - {3}:
        assert not generate.reason
        generate.end(75, index)
        generate.end(0, index)
    assert (generate.reason, generate.failed) == ("FailedIndexes", {3})


def pauses(spec: Object, pods: int, incidents: int, code: int = 75) -> list[float]:
    """Return the pause after each incident in which all pods of a Job end."""
    job, found = Job({**spec, "completions": pods}), []
    for _ in range(incidents):
        for index in range(pods):
            job.end(code, index)
        found.append(job.pause())
    return found


def test_the_model_waits_as_a_cluster_does(render: Render) -> None:
    """The figures were measured on Kubernetes 1.36, where each loss of a rank still ended all pods of the run."""
    spec = next(thing["spec"] for thing in of(render("cpu-demo"), "Job") if thing["metadata"]["name"] == "train")
    assert pauses(spec, pods=2, incidents=4) == [20, 80, 320, 600]
    assert pauses(spec, pods=4, incidents=2) == [80, 600]
    assert pauses(spec, pods=1, incidents=3, code=143) == [10, 20, 40], "what is not counted waits longer, too"


def incidents(pods: int, restarts: int, spec: Object) -> int:
    """Return how often a rank may be killed before the run fails; its peers end with 75, in place or as pods."""
    job, left = Job({**spec, "completions": pods}), [restarts] * pods
    for number in range(10 * pods + 200):
        lost = number % pods
        left[lost] = restarts + 1  # a new pod has all its restarts; one is taken below
        job.end(137, lost)
        for peer in range(pods):
            left[peer] -= 1
            if left[peer] < 0 and not job.reason:
                left[peer] = restarts
                job.end(75, peer)
        if job.reason:
            return number
    return 10 * pods + 200


def test_a_lost_rank_costs_a_run_one_pod_and_not_all(render: Render) -> None:
    """Each counts towards the limit of a Job: 32 pods that end together would use up 100 at the fourth loss."""
    job = next(thing for thing in of(render("cpu-demo"), "Job") if thing["metadata"]["name"] == "train")
    arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    restarts = next((int(found[1]) for a in arguments if (found := re.fullmatch(r"--restarts=(\d+)", a))), 0)
    assert incidents(32, 0, job["spec"]) == 3
    assert incidents(32, restarts, job["spec"]) >= 20
    assert incidents(2, restarts, job["spec"]) == 100


def test_what_is_no_job_is_started_always_or_never(render: Render) -> None:
    found = render("single-gpu")
    (server,), (files,) = of(found, "Deployment"), of(found, "Pod")
    assert server["spec"]["template"]["spec"].get("restartPolicy", "Always") == "Always"
    assert files["spec"]["restartPolicy"] == "Never"


def test_a_finished_job_starts_nothing_whatever_is_applied(render: Render) -> None:
    """Why run.sh must delete a Job whose settings have changed: the controller would say Complete, and do nothing."""
    job = Job(one(of(render("cpu-demo"), "Job")[0]["spec"]))
    job.end(0)
    assert job.complete
    with pytest.raises(AssertionError, match="starts no pod"):
        job.end(0)
