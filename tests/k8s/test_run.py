"""k8s/run.sh runs each step when the one before it is done, and knows what a Job was started with.

Real kubectl talks to an API server of the test's own, which follows the rules by which Kubernetes keeps Jobs.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from api_server import ApiServer, pod, warning
from overlays import ROOT

# The first REFUSES questions after REACHED answers find no API server. The logs are nobody's.
KUBECTL = r"""#!/bin/sh
case "$*" in
kustomize*) exec KUBECTL "$@" ;;
esac
printf "%s\n" "$*" >> "$LOG"
if [ "$(wc -l < "$LOG")" -gt "$REACHED" ] && [ "$(wc -l < "$LOG")" -le $((REACHED + REFUSES)) ]; then
    echo "$REFUSAL" >&2
    exit 1
fi
case "$*" in
*" logs "*) echo "[pod/export-0/onnx] error: no checkpoint" ;;
*) exec KUBECTL --server "$SERVER" "$@" ;;
esac
"""
REFUSED = "The connection to the server 10.0.0.1:6443 was refused - did you specify the right host or port?"


Done = tuple[subprocess.CompletedProcess[str], list[str]]
Run = Callable[..., Done]


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as api:
        yield api
        api.shutdown()


@pytest.fixture
def run(tmp_path: Path, server: ApiServer) -> Run:
    """Return a function that runs the script and returns (what it did, what kubectl was told)."""
    stub = tmp_path / "bin" / "kubectl"
    stub.parent.mkdir()
    stub.write_text(KUBECTL.replace("KUBECTL", str(shutil.which("kubectl"))))
    stub.chmod(0o755)
    log = tmp_path / "log"

    def call(*arguments: str, **settings: object) -> Done:
        environment = {
            **{"PATH": f"{stub.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "KUBECONFIG": "/dev/null"},
            **{"LOG": str(log), "SERVER": server.url, "POLL_SECONDS": "0"},
            **{"REACHED": "1", "REFUSES": "0", "REFUSAL": REFUSED},
            **{name.upper(): str(value) for name, value in settings.items() if name not in ("fails", "looks", "root")},
        }
        server.fails = {str(settings.get("fails", ""))}
        server.looks = int(str(settings.get("looks", 2)))
        log.unlink(missing_ok=True)
        done = subprocess.run(
            [Path(str(settings.get("root", ROOT))) / "k8s/run.sh", *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return done, log.read_text().splitlines() if log.exists() else []

    return call


def test_steps_follow_one_another(run: Run, server: ApiServer) -> None:
    server.objects["pods"] = [pod(f"train-{i}", phase) for i, phase in enumerate(("Running", "Running", "Pending"))]
    done, _ = run("cpu-demo")
    assert done.returncode == 0, done.stderr
    jobs = server.objects["jobs"]
    assert [job["metadata"]["name"] for job in jobs] == ["train", "export", "generate", "generate-merge"]
    ends = [job["status"]["conditions"][0]["lastTransitionTime"] for job in jobs]
    begins = [job["metadata"]["creationTimestamp"] for job in jobs]
    assert all(end < begin for end, begin in zip(ends, begins[1:], strict=False)), "waits before the next"
    assert "train: pods: 1 Pending 2 Running" in done.stdout
    assert "generate-merge: done\n" in done.stdout


def test_a_failed_step_ends_it_with_its_last_words(run: Run) -> None:
    done, told = run("cpu-demo", fails="export")
    assert done.returncode == 1
    assert "error: export has failed: BackoffLimitExceeded: too often" in done.stderr
    assert "error: no checkpoint" in done.stderr
    assert not any("job/generate" in line for line in told)


def test_single_steps_can_be_named_and_mistakes_are_told(run: Run) -> None:
    done, told = run("cpu-demo", "generate")
    assert done.returncode == 0
    assert not any("job/train" in line for line in told)
    for arguments, message in (
        (("nosuch",), "no overlay nosuch; expected one of: cpu-demo"),
        (("cpu-demo", "x"), "no step x"),
        (("cpu-demo", "generate", "serve"), "the overlay cpu-demo has no step serve"),
    ):
        done, told = run(*arguments)
        assert (done.returncode, told) == (2, [])
        assert message in done.stderr


@pytest.mark.parametrize("reached", [1, 2, 3, 4, 5], ids=["job", "apply", "job again", "pods", "end"])
def test_it_outlasts_an_api_server_that_restarts(run: Run, reached: int) -> None:
    done, _ = run("cpu-demo", "train", reached=reached, refuses=20)
    assert done.returncode == 0, done.stderr
    assert "train: done" in done.stdout
    assert done.stderr.count("no answer, asking again: The connection to the server") == 1, "once, not at every look"


@pytest.mark.parametrize(
    ("settings", "tries", "words"),
    [
        ({"reached": 0, "refuses": 1}, 1, "right host or port"),  # never reached: the wrong address, more likely
        ({"reached": 2, "refuses": 999}, 3 + 120, "right host or port"),
        ({"reached": 3, "refuses": 1, "refusal": 'Error from server (NotFound): jobs "train"'}, 4, "NotFound"),
    ],
    ids=["no cluster", "for too long", "deleted"],
)
def test_it_gives_up_where_waiting_does_not_help(run: Run, settings: dict[str, object], tries: int, words: str) -> None:
    done, told = run("cpu-demo", "train", **settings)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(told) == tries


def test_it_says_why_pods_wait_and_goes_on_saying_so(run: Run, server: ApiServer) -> None:
    reason = "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) didn't match pod affinity rules."
    server.objects["pods"] = [pod("train-0-a", "Pending"), pod("train-1-b", "Pending"), pod("train-2-c", "Running")]
    server.objects["events"] = [
        warning("train-0-a", "FailedScheduling", reason, 2),
        warning("train-0-a", "FailedScheduling", "an older one", 1),
        warning("train-1-b", "FailedScheduling", reason, 1),
        warning("train-2-c", "BackOff", "of one that runs now", 3),
        warning("generate-0-d", "FailedScheduling", "of another step", 3),
    ]
    done, _ = run("cpu-demo", "train", looks=14)  # a minute is 12 looks
    kinds = ("train: pods", "train: waits", "train: done")
    lines = [line for line in done.stdout.splitlines() if line.startswith(kinds)]
    said = ["train: pods: 2 Pending 1 Running", f"train: waits: FailedScheduling: {reason}"]
    assert lines == [*said, *said, "train: done"]


def test_it_says_that_a_queue_holds_a_job_back(run: Run, server: ApiServer) -> None:
    server.objects["pods"] = []
    server.suspended = {"train"}
    done, _ = run("cpu-demo", "train", looks=3)
    assert done.stdout.count("train: pods: none yet\ntrain: waits: suspended until its queue admits it\n") == 1
    assert done.stdout.endswith("train: done\n")


@pytest.mark.parametrize(
    ("reason", "code"), [("ImagePullBackOff", 0), ("CreateContainerConfigError", 0), ("InvalidImageName", 1)]
)
def test_it_says_what_a_container_waits_for(run: Run, server: ApiServer, reason: str, code: int) -> None:
    """A registry may be back in a minute; a name that is none never becomes one."""
    server.objects["pods"] = [pod("train-0-a", "Pending", waits=reason)]
    answer = 'failed to pull image "localhost/dcgan:nosuch": not found'
    server.objects["events"] = [warning("train-0-a", "Failed", answer)]
    done, _ = run("cpu-demo", "train")
    assert done.returncode == code
    if code:
        assert f"error: train can never start: {reason}, Failed: {answer}\n" in done.stderr
    else:
        assert f"train: pods: 1 Pending ({reason})\ntrain: waits: Failed: {answer}\n" in done.stdout


def test_it_says_why_there_are_no_pods(run: Run, server: ApiServer) -> None:
    server.objects["pods"] = []
    server.objects["events"] = [warning("train", "FailedCreate", 'pods "train-0-" is forbidden: exceeded quota')]
    done, _ = run("cpu-demo", "train")
    assert "train: pods: none yet\ntrain: waits: FailedCreate: pods" in done.stdout


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        ({"exitCode": 65, "message": 'seen: 5\nerror: a "bad" shard\nstopping\n'}, '65, Error: error: a "bad" shard'),
        ({"exitCode": 1, "message": "Traceback\n  x\nNameError: y\n"}, "1, Error: NameError: y"),
        ({"exitCode": 137, "reason": "OOMKilled"}, "137, OOMKilled: "),
    ],
    ids=["ours", "a bug", "memory"],
)
def test_it_repeats_the_last_words_of_a_failed_pod_once(
    run: Run, server: ApiServer, ended: dict[str, object], words: str
) -> None:
    terminated = {"reason": "Error", "finishedAt": "2026-01-01T00:00:00Z", **ended}
    server.objects["pods"] = [pod("train-0-a", "Failed", terminated=terminated), pod("train-0-b", "Running")]
    done, _ = run("cpu-demo", "train", looks=3)
    failed = [line for line in done.stdout.splitlines() if "failed" in line]
    assert failed == [f"train: train-0-a failed 2026-01-01T00:00:00Z with code {words}"]


def test_it_says_what_the_node_said_of_an_evicted_pod(run: Run, server: ApiServer) -> None:
    message = 'Usage of EmptyDir volume "tmp" exceeds the limit "2Gi".'
    server.objects["pods"] = [pod("train-0-a", "Failed", message=message)]
    done, _ = run("cpu-demo", "train")
    assert f"train: train-0-a failed {message}" in done.stdout.splitlines()
