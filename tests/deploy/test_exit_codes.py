"""Programs, launcher and job scripts for Slurm keep the table of exit codes of docs/operations.md.

tests/k8s/test_job_controller.py compares the manifests for Kubernetes and Argo with the same table.
"""

import os
import subprocess
from pathlib import Path

import pytest
from exit_codes import CODES, DISRUPTED, promises, rows
from support import ROOT

from deploy.launcher import OURS, PASSING, SAVED
from pipeline.common.errors import UserError

SCRIPTS = sorted((ROOT / "deploy/slurm").glob("*.sbatch"))


def codes_of(kind: type[UserError]) -> set[int]:
    return {kind.exit_code}.union(*[codes_of(child) for child in kind.__subclasses__()])


def test_every_exit_code_has_one_row() -> None:
    known = promises("Job")
    assert {0, 1, 137, DISRUPTED} | codes_of(UserError) <= set(known)
    assert len(known) == sum(len(row["code"].split(",")) for row in rows(CODES))


def test_the_launcher_starts_again_in_place_what_the_page_says() -> None:
    promised = promises("in the pod")
    assert {code for code, then in promised.items() if then == "again"} == set(PASSING)
    assert {code for code, then in promised.items() if then not in ("again", "done")} >= {*OURS, *SAVED} - {*PASSING}
    assert set(OURS) == {code for code in codes_of(UserError) if code < 128}, "else a peer's code could hide it"


def requeued(tmp_path: Path, code: int, restarts: int) -> bool:
    """Run the function that all job scripts share on a program that ends with `code`; whether its job comes again."""
    tools = tmp_path / f"tools-{code}-{restarts}"
    tools.mkdir()
    bodies = {"srun": 'exec "$@"', "scontrol": f'echo "$@" >> {tools}/said', "program": f"exit {code}"}
    for name, body in bodies.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    script = f'. "{ROOT}/deploy/slurm/common.sh"; step program; echo "went on"'
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, ""), "the job ends as its program did"
    said = (tools / "said").read_text() if (tools / "said").exists() else ""
    assert said in ("", "requeue 17\n")
    return bool(said)


@pytest.mark.parametrize("code", sorted(set(promises("Slurm")) - {DISRUPTED}))
def test_a_slurm_job_does_what_the_page_says(tmp_path: Path, code: int) -> None:
    again, beyond = requeued(tmp_path, code, 99), requeued(tmp_path, code, 100)
    found = "always" if beyond else "again" if again else "done" if code == 0 else "fails"
    assert found == promises("Slurm")[code]


def test_slurm_itself_requeues_a_job_whose_node_is_lost() -> None:
    assert promises("Slurm")[DISRUPTED] == "always"
    assert len(SCRIPTS) == 6
    for script in SCRIPTS:
        assert "\n#SBATCH --requeue\n" in script.read_text(), script.name
