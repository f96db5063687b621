"""k8s/run.sh runs each step when the one before it is done. A script answers in place of a cluster."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from overlays import ROOT

# Renders for real. A Job is done when it is asked about for the second time, or fails if it is named in FAILS.
KUBECTL = r"""#!/bin/sh
case "$*" in
kustomize*) exec KUBECTL "$@" ;;
esac
echo "$*" >> "$LOG"
case "$*" in
apply*=base*) echo namespace/dcgan ;;
apply*=train\ *) echo service/ranks; echo job.batch/train ;;
apply*) name="${5#*=}"; echo "job.batch/$name" ;;
*conditions*)
    name="${4#*/}"
    if [ "$name" = "$FAILS" ]; then echo Failed
    elif [ -e "$LOG.$name" ]; then echo "SuccessCriteriaMet Complete"
    else touch "$LOG.$name"
    fi ;;
*phase*) echo "Running Running Pending" ;;
*logs*) echo "[pod/export-0/onnx] error: no checkpoint" ;;
esac
"""


Done = tuple[subprocess.CompletedProcess[str], list[str]]
Run = Callable[..., Done]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs the script and returns (what it did, what kubectl was told)."""
    stub = tmp_path / "bin" / "kubectl"
    stub.parent.mkdir()
    stub.write_text(KUBECTL.replace("KUBECTL", str(shutil.which("kubectl"))))
    stub.chmod(0o755)
    log = tmp_path / "log"

    def call(*arguments: str, fails: str = "") -> Done:
        log.unlink(missing_ok=True)
        environment = {"PATH": f"{stub.parent}:{os.environ['PATH']}", "LOG": str(log), "FAILS": fails}
        done = subprocess.run(
            [ROOT / "k8s/run.sh", *arguments],
            env={**os.environ, **environment, "POLL_SECONDS": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        return done, log.read_text().splitlines() if log.exists() else []

    return call


def test_steps_follow_one_another(run: Run) -> None:
    done, told = run("cpu-demo")
    assert done.returncode == 0, done.stderr
    heard = [line.split("=")[-1].split()[0] if "apply" in line else "ask" for line in told]
    order = [name for name in heard if name != "ask"]
    assert order == ["base", "train", "export", "generate", "generate-merge"]
    assert heard[heard.index("train") + 1] == "ask", "waits before the next"
    assert "train: pods: 1 Pending 2 Running" in done.stdout
    assert "generate-merge: done" in done.stdout


def test_a_failed_step_ends_it_with_its_last_words(run: Run) -> None:
    done, told = run("cpu-demo", fails="export")
    assert done.returncode == 1
    assert "error: export has failed" in done.stderr
    assert "error: no checkpoint" in done.stderr
    assert not any("component=generate" in line for line in told)


def test_single_steps_can_be_named_and_mistakes_are_told(run: Run) -> None:
    done, told = run("cpu-demo", "generate")
    assert done.returncode == 0
    assert not any("component=train" in line for line in told)
    for arguments, message in (
        (("nosuch",), "no overlay nosuch; expected one of: cpu-demo"),
        (("cpu-demo", "x"), "no step x"),
    ):
        done, told = run(*arguments)
        assert (done.returncode, told) == (2, [])
        assert message in done.stderr
