"""k8s/trial.py tries a cluster: what it refuses, what it checks, and that nothing of it stays.

Real kubectl and the real k8s/run.sh talk to the API server of these tests. Of `kubectl exec`, which that server lacks,
the command runs here: it fetches metrics from a server of the test, and reads a manifest from its folder.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from api_server import ApiServer, pod, warning
from overlays import ROOT
from test_run import server

__all__ = ["server"]
KUBECTL = r"""#!/bin/sh
case " $* " in
*" exec "*) ;;
*) exec KUBECTL "$@" ;;
esac
printf '%s\n' "$*" >> "$LOG"
while [ "$1" != -- ]; do shift; done
shift
case $1 in
cat) exec cat "$WORK${2#/work}" ;;
*) exec PYTHON -c "$(printf '%s' "$3" | sed "s/:9400/:$PORT/")" ;;
esac
"""
METRICS = b"""# TYPE dcgan_train_seen_images gauge
dcgan_train_seen_images{run="run"} 640.0
dcgan_generate_images_total 250.0
"""
Call = Callable[..., subprocess.Popen[str]]
Finish = Callable[[subprocess.Popen[str]], tuple[int, str, str]]
SHARDS = [{"name": f"samples-{i}.tar", "images": 15_000, "sha256": str(i) * 64} for i in range(2)]


class Metrics(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(METRICS)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as metrics:
        threading.Thread(target=metrics.serve_forever, daemon=True).start()
        yield metrics.server_port
        metrics.shutdown()


@pytest.fixture
def samples(tmp_path: Path) -> Callable[..., None]:
    """Write the manifest that a round ends with: samples("undisturbed", shards)."""

    def write(name: str, shards: list[dict[str, object]]) -> None:
        path = tmp_path / "work" / name / "samples/manifest.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"shards": shards}))

    return write


@pytest.fixture
def begin(tmp_path: Path, server: ApiServer, port: int, samples: Callable[..., None]) -> Iterator[Call]:
    """Return a function that starts the trial: begin(*arguments, context=…, url=…)."""
    for name in ("undisturbed", "disturbed"):
        samples(name, SHARDS)
    stub = tmp_path / "bin/kubectl"
    stub.parent.mkdir()
    stub.write_text(KUBECTL.replace("KUBECTL", str(shutil.which("kubectl"))).replace("PYTHON", sys.executable))
    stub.chmod(0o755)
    log = tmp_path / "log"
    log.touch()
    made: dict[str, int] = {}

    def holds(job: str) -> bool:
        """A pod is at work until it was asked for its metrics, the second time until one was lost."""
        if job not in ("train", "generate"):
            return False
        when = server.job(job)["metadata"]["creationTimestamp"]
        round_ = made.setdefault(f"{job} {when}", 1 + sum(key.startswith(f"{job} ") for key in made))
        if round_ == 2:
            return not any(name.startswith(f"{job}-1-") for name in server.lost)
        return f" exec {job}-" not in log.read_text()

    server.makes_pods, server.holds, server.objects["pods"] = True, holds, []
    running: list[subprocess.Popen[str]] = []

    def call(*arguments: str, context: str = "kind-test", url: str | None = None) -> subprocess.Popen[str]:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": context,
            "contexts": [{"name": context, "context": {"cluster": "test", "user": "test"}}],
            "clusters": [{"name": "test", "cluster": {"server": url or server.url}}],
            "users": [{"name": "test", "user": {}}],
        }
        (tmp_path / "config").write_text(json.dumps(config))
        (tmp_path / "tmp").mkdir(exist_ok=True)
        environment = {
            **{"PATH": f"{stub.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "TMPDIR": str(tmp_path / "tmp")},
            **{"LOG": str(log), "PORT": str(port), "WORK": str(tmp_path / "work"), "POLL_SECONDS": "0.1"},
            "KUBECONFIG": str(tmp_path / "config"),
        }
        running.append(
            subprocess.Popen(
                [sys.executable, ROOT / "k8s/trial.py", *arguments],
                env={**os.environ, **environment},
                stdout=(tmp_path / "out").open("w"),
                stderr=(tmp_path / "err").open("w"),
                text=True,
                cwd=tmp_path,
            )
        )
        return running[-1]

    yield call
    for process in running:
        if process.poll() is None:
            process.terminate()
            process.wait()
    assert not list((tmp_path / "tmp").glob("*")), "temporary files stay"


@pytest.fixture
def finish(tmp_path: Path) -> Finish:
    """Return a function that waits for the trial and returns (exit code, stdout, stderr)."""

    def wait(trial: subprocess.Popen[str]) -> tuple[int, str, str]:
        code = trial.wait(timeout=280)
        return code, (tmp_path / "out").read_text(), (tmp_path / "err").read_text()

    return wait


def test_both_rounds_and_then_nothing_stays(begin: Call, finish: Finish, server: ApiServer) -> None:
    code, out, err = finish(begin("--image", "registry:5000/x/dcgan:1.2"))
    assert code == 0, out + err
    assert out.startswith("context kind-test, namespace dcgan-trial\n== once, undisturbed\n")
    assert "undisturbed: 30,000 samples in 2 shards, each read again by generate-merge\n" in out
    assert "serves metrics: dcgan_train_seen_images is 640\n" in out
    assert "serves metrics: dcgan_generate_images_total is 250\n" in out
    assert [name[: name.rindex("-")] for name in server.lost] == ["train-1", "generate-1"]
    assert "the samples are the same with lost pods as without: 2 shards" in out
    assert not server.objects["namespaces"] + server.objects["jobs"]


def test_a_step_that_fails_leaves_its_logs_and_nothing_else(
    begin: Call, finish: Finish, server: ApiServer, tmp_path: Path
) -> None:
    server.fails = {"export"}
    server.objects["events"] = [warning("export", "BackOff", "no luck")]
    code, out, err = finish(begin("--logs", "found"))
    assert code == 1, out + err
    assert "error: export failed; what it said last is above\nlogs, events and objects: found\n" in err
    files = {path.name for path in (tmp_path / "found").iterdir()}
    assert {"pods.txt", "events.txt", "objects.yaml", "describe.txt"} <= files
    assert any(name.startswith("train-1-") for name in files)
    assert "export.0" in (tmp_path / "found/events.txt").read_text()
    (log,) = (tmp_path / "found").glob("export-0-*.log")
    assert "/x] the last words of export-0-" in log.read_text()
    assert "kind: Job" in (tmp_path / "found/objects.yaml").read_text()
    assert not server.objects["namespaces"] + server.objects["jobs"]


def test_missing_samples_are_found(begin: Call, finish: Finish, samples: Callable[..., None]) -> None:
    samples("undisturbed", SHARDS[:1])
    code, _, err = finish(begin())
    assert code == 1
    assert "error: the samples are 15,000, and should be 30,000\n" in err


def test_other_samples_are_found(begin: Call, finish: Finish, samples: Callable[..., None]) -> None:
    samples("disturbed", [SHARDS[0], {**SHARDS[1], "sha256": "f" * 64}])
    code, _, err = finish(begin())
    assert code == 1
    assert "error: the samples differ from the undisturbed ones: 1 shards, the first is samples-1.tar\n" in err


def test_what_waits_for_ever_ends_in_time_and_says_why(begin: Call, finish: Finish, server: ApiServer) -> None:
    server.makes_pods, server.looks = False, 10**6
    server.objects["pods"] = [pod("train-0-a", "Pending")]
    server.objects["pods"][0]["metadata"]["namespace"] = "dcgan-trial"
    server.objects["events"] = [warning("train-0-a", "FailedScheduling", "0/1 nodes are available: Insufficient cpu")]
    code, out, err = finish(begin("--minutes", "1"))
    assert code == 75, out + err
    assert "train: pods: 1 Pending\ntrain: waits: FailedScheduling: 0/1 nodes are available: Insufficient cpu\n" in out
    assert "error: train has not ended, and the 1 minutes are over\n" in err
    assert not server.objects["namespaces"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_takes_everything_away(
    begin: Call, finish: Finish, server: ApiServer, number: int, code: int
) -> None:
    server.looks = 10**6
    trial = begin()
    deadline = time.monotonic() + 120
    while not server.objects["jobs"] and time.monotonic() < deadline:
        time.sleep(0.1)
    trial.send_signal(number)
    ended, out, err = finish(trial)
    assert ended == code, out + err
    assert err.endswith("stopped; cleaning up\n")
    assert not server.objects["namespaces"] + server.objects["jobs"]


def test_it_may_stay_to_be_looked_at(begin: Call, finish: Finish, server: ApiServer) -> None:
    server.fails = {"train"}
    code, out, _ = finish(begin("--keep", "--namespace", "other"))
    assert code == 1
    assert "left, as told: the namespace other. To delete it: kubectl delete namespace other\n" in out
    assert [thing["metadata"]["name"] for thing in server.objects["namespaces"]] == ["other"]
    code, _, err = finish(begin("--namespace", "other"))
    assert (code, err.count("\n")) == (78, 1)
    assert err.startswith("error: the namespace other is there already; delete it")


@pytest.mark.parametrize(
    ("arguments", "settings", "code", "words"),
    [
        ([], {"url": "http://127.0.0.1:9"}, 69, "no cluster answers in context kind-test: kubectl get: "),
        (
            [],
            {"context": "eks-prod-eu"},
            78,
            "the context eks-prod-eu sounds like production; to run there all the same",
        ),
        ([], {"url": "https://live.example.com"}, 78, "the server https://live.example.com sounds like production"),
        (["other"], {}, 2, "the current context is kind-test, not other; first: kubectl config use-context other"),
        (["--image", "dcgan"], {}, 2, "--image dcgan: expected REGISTRY/NAME:TAG"),
    ],
    ids=["no answer", "production", "its server", "another context", "no tag"],
)
def test_it_refuses_in_one_line(
    begin: Call,
    finish: Finish,
    server: ApiServer,
    arguments: list[str],
    settings: dict[str, str],
    code: int,
    words: str,
) -> None:
    ended, out, err = finish(begin(*arguments, **settings))
    assert (ended, out, err.count("\n")) == (code, "", 1), err
    assert err.startswith(f"error: {words}")
    assert not server.objects["namespaces"]


def test_no_context_and_an_old_cluster_are_refused(
    begin: Call, finish: Finish, server: ApiServer, tmp_path: Path
) -> None:
    server.version = {"major": "1", "minor": "33+", "gitVersion": "v1.33.4-eks"}
    code, out, err = finish(begin())
    assert (code, out) == (69, "")
    assert err == "error: the cluster in context kind-test is Kubernetes v1.33.4-eks; needs 1.34 or newer\n"
    command = [sys.executable, str(ROOT / "k8s/trial.py")]
    environment = {**os.environ, "KUBECONFIG": str(tmp_path / "nothing"), "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (69, 1), done.stderr
    assert done.stderr.startswith("error: no current context (")


def test_a_name_that_sounds_like_production_can_be_confirmed(begin: Call, finish: Finish, server: ApiServer) -> None:
    server.fails = {"train"}
    code, out, _ = finish(begin("eks-prod-eu", context="eks-prod-eu"))
    assert code == 1
    assert out.startswith("context eks-prod-eu, namespace dcgan-trial\n")
