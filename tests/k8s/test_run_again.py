"""A Job owns what it was started with: what k8s/run.sh does when it is run again, with the same settings and others."""

from collections.abc import Callable
from pathlib import Path

import pytest
from api_server import ApiServer, pod
from overlays import variant
from test_run import Run, run, server

Edit = Callable[..., None]
__all__ = ["run", "server"]
EVERY = {"train", "export", "generate", "generate-merge"}


@pytest.fixture
def edit(copy: Path) -> Edit:
    """Change values in the one file that users edit: edit(COUNT=900), edit(newTag="next")."""

    def change(**values: object) -> None:
        path = copy / "k8s/overlays/cpu-demo/edit/kustomization.yaml"
        lines = path.read_text().splitlines()
        for key, value in values.items():
            lines = [line for line in lines if not line.startswith(f"      - {key}=")]
            if key == "newTag":
                lines = [line.replace("newTag: 0.1.0", f"newTag: {value}") for line in lines]
            else:
                lines.insert(lines.index("    literals:") + 1, f"      - {key}={value}")
        path.write_text("\n".join(lines))

    return change


def ran(server: ApiServer) -> dict[str, str]:
    """Return when each Job that is there was made."""
    return {job["metadata"]["name"]: job["metadata"]["creationTimestamp"] for job in server.objects["jobs"]}


def test_the_same_again_is_done_before(run: Run, server: ApiServer, copy: Path) -> None:
    assert run("cpu-demo", root=copy, looks=1)[0].returncode == 0
    before = ran(server)
    done, _ = run("cpu-demo", root=copy, looks=1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done before, at 2026-") == 4
    assert ": done\n" not in done.stdout
    assert ran(server) == before


@pytest.mark.parametrize(
    ("change", "words", "again"),
    [
        ({"COUNT": 900}, "generate: finished T with COUNT=3000 (now 900); runs again", {"generate", "generate-merge"}),
        (
            {"SEED": 8, "SAMPLES": "/work/b", "PARTS": 4},
            "finished T with PARTS=3 (now 4), SAMPLES=/work/samples (now /work/b), SEED=0 (now 8); runs again",
            {"generate", "generate-merge"},
        ),
        ({"TOTAL_IMAGES": 26000}, "train: finished T with TOTAL_IMAGES=128000 (now 26000)", EVERY),
        ({"newTag": "next"}, "T with image localhost/dcgan:0.1.0 (now localhost/dcgan:next); runs again", EVERY),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_changed_setting_is_never_done_without_work(
    run: Run, server: ApiServer, copy: Path, edit: Edit, change: dict[str, object], words: str, again: set[str]
) -> None:
    assert run("cpu-demo", root=copy, looks=1)[0].returncode == 0
    before = ran(server)
    edit(**change)
    done, _ = run("cpu-demo", root=copy, looks=1)
    assert done.returncode == 0, done.stderr
    first, _, rest = words.partition("T ")
    assert first in done.stdout
    assert rest in done.stdout
    made = {name for name, when in ran(server).items() if when != before[name]}
    assert made == again, "and what works on it, but no step that does not use it"


def test_a_running_job_keeps_its_settings(run: Run, server: ApiServer, copy: Path, edit: Edit) -> None:
    edit(SEED=7, SAMPLES="/work/samples-7")
    run("cpu-demo", "generate", root=copy, looks=999, reached=4, refuses=1, refusal="stop")  # the watcher is gone
    edit(SEED=8, SAMPLES="/work/samples-8")
    assert run("cpu-demo", "train", root=copy)[0].returncode == 0, "the next job's settings are there"
    read = server.start_pod("generate")  # a drain replaces a pod
    assert (read["SEED"], read["SAMPLES"]) == ("7", "/work/samples-7")
    done, _ = run("cpu-demo", "generate", root=copy, looks=999)
    assert done.returncode == 1
    assert "error: generate is running, since 2026-" in done.stderr
    assert "SAMPLES=/work/samples-7 (now /work/samples-8), SEED=7 (now 8)" in done.stderr
    assert "kubectl -n dcgan delete job/generate" in done.stderr


@pytest.mark.parametrize(
    ("step", "pods", "change", "words"),
    [
        ("train", 2, {"NODES": 4, "BATCH": 64}, "NODES=2 (now 4)"),
        ("generate", 3, {"PARTS": 2}, "PARTS=3 (now 2)"),  # else an index would go, with its shards
    ],
)
def test_the_number_of_pods_of_a_running_job_stays(
    run: Run, server: ApiServer, copy: Path, edit: Edit, step: str, pods: int, change: dict[str, object], words: str
) -> None:
    run("cpu-demo", step, root=copy, looks=999, reached=4, refuses=1, refusal="stop")
    edit(**change)
    done, _ = run("cpu-demo", step, root=copy, looks=999)
    assert (done.returncode, server.job(step)["spec"]["completions"]) == (1, pods)
    assert words in done.stderr


def test_other_settings_do_not_concern_a_running_job(run: Run, server: ApiServer, copy: Path, edit: Edit) -> None:
    run("cpu-demo", "train", root=copy, looks=999, reached=4, refuses=1, refusal="stop")
    before = ran(server)
    edit(SEED=8)
    done, _ = run("cpu-demo", "train", root=copy)
    assert done.returncode == 0, done.stderr
    assert ran(server) == before


def test_other_manifests_of_a_running_job_are_one_line(run: Run, server: ApiServer, copy: Path, edit: Edit) -> None:
    run("cpu-demo", "train", root=copy, looks=999, reached=4, refuses=1, refusal="stop")
    edit(TRAIN_MEMORY="4Gi")
    done, _ = run("cpu-demo", "train", root=copy, looks=999)
    assert done.returncode == 1
    assert "error: train is running, and was started from other manifests" in done.stderr
    assert "{" not in done.stderr
    assert max(map(len, done.stderr.splitlines())) < 250


def test_yesterdays_failure_is_not_todays(run: Run, server: ApiServer, copy: Path) -> None:
    done, _ = run("cpu-demo", "generate", root=copy, fails="generate")
    assert done.returncode == 1
    assert "generate runs again, and resumes" in done.stderr
    done, _ = run("cpu-demo", "generate", root=copy)
    assert done.returncode == 0, done.stderr
    assert "generate: failed 2026-" in done.stdout
    assert "; runs again\n" in done.stdout
    assert "generate: done\n" in done.stdout


def test_down_takes_jobs_away_before_their_namespace(run: Run, server: ApiServer) -> None:
    run("cpu-demo", "generate", looks=999, reached=4, refuses=1, refusal="stop")
    done, _ = run("cpu-demo", "down")
    assert done.returncode == 0, done.stderr
    left = {what for what, things in server.objects.items() if things}
    assert not {"jobs", "services"} & left
    assert {"namespaces", "persistentvolumeclaims", "configmaps"} <= left
    assert "k8s/run.sh cpu-demo down --volume" in done.stdout
    run("cpu-demo", "generate", looks=999, reached=4, refuses=1, refusal="stop")
    assert run("cpu-demo", "down", "--volume")[0].returncode == 0
    assert server.objects["namespaces"] == []


def test_a_server_is_waited_for(run: Run, server: ApiServer) -> None:
    assert "serve: ready\n" in run("single-gpu", "serve")[0].stdout
    server.objects["deployments"] = []
    server.objects["pods"] = [pod("serve-7d9f-x", "Pending", waits="ImagePullBackOff")]
    server.objects["pods"][0]["metadata"]["labels"]["app.kubernetes.io/component"] = "serve"
    done, _ = run("single-gpu", "serve", fails="serve", reached=12, refuses=3, refusal="stop")
    assert done.returncode == 1
    assert "serve: pods: 1 Pending (ImagePullBackOff)" in done.stdout
    assert "serve: ready" not in done.stdout


def test_another_samples_folder_is_told_by_its_setting(run: Run, server: ApiServer) -> None:
    """The program speaks of its option; the person who set a SEED without another SAMPLES knows the setting."""
    message = "error: /work/samples: holds another generation (seed 0 != 8); choose another --out"
    ended = {"reason": "Error", "finishedAt": "2026-01-01T00:00:00Z", "exitCode": 78, "message": message}
    server.objects["pods"] = [pod("generate-0-a", "Failed", terminated=ended)]
    done, _ = run("cpu-demo", "generate", fails="generate")
    assert message in done.stdout
    assert "generate: --out is SAMPLES in cpu-demo/edit/kustomization.yaml\n" in done.stdout


def test_a_pod_to_copy_with(run: Run, server: ApiServer) -> None:
    assert "files: ready\n" in run("cpu-demo", "files")[0].stdout
    (made,) = [thing for thing in server.objects["pods"] if thing["metadata"]["name"] == "files"]
    assert made["spec"]["securityContext"]["runAsUser"] == 10001


def test_a_train_job_keeps_what_it_was_started_with(run: Run, server: ApiServer, copy: Path, edit: Edit) -> None:
    """Its runtime may change at any time, and is read again when a queue lets the TrainJob go on."""
    overlays = copy / "k8s/overlays"
    variant(overlays / "cpu-demo", overlays / "trainer", ["trainjob", "kueue"])
    run("trainer", "train", root=copy, looks=999, reached=4, refuses=1, refusal="stop")  # the watcher is gone
    (job,), (runtime,) = server.objects["trainjobs"], server.objects["trainingruntimes"]
    before = (str(job["spec"]), str(job["metadata"]), str(runtime))
    edit(SEED=8)  # nothing to training
    done, _ = run("trainer", "train", root=copy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("train: done\n")
    assert before == (str(job["spec"]), str(job["metadata"]), str(runtime))
    assert "train: done before, at 2026-" in run("trainer", "train", root=copy)[0].stdout
    edit(TOTAL_IMAGES=26000)
    assert "with TOTAL_IMAGES=128000 (now 26000); runs again" in run("trainer", "train", root=copy)[0].stdout
    edit(newTag="next")
    done, _ = run("trainer", "train", root=copy, looks=999, reached=14, refuses=1, refusal="stop")
    assert "with image localhost/dcgan:0.1.0 (now localhost/dcgan:next); runs again" in done.stdout
    edit(TOTAL_IMAGES=28000)
    done, _ = run("trainer", "train", root=copy, looks=999)
    assert done.returncode == 1
    assert "TOTAL_IMAGES=26000 (now 28000)" in done.stderr
    assert "kubectl -n dcgan delete trainjob/train" in done.stderr
    assert run("trainer", "down", root=copy)[0].returncode == 0
    assert not server.objects["trainjobs"] + server.objects["trainingruntimes"]
