"""A process that waits in vain ends itself; how long it may take follows from what it took before."""

import subprocess
import sys
import textwrap

import pytest
import warm_start

PRELUDE = """
import time
from pipeline.training import watchdog
watchdog.BOUNDARY_SECONDS = 30.0
dog = watchdog.Watchdog(2.0, enabled=True).__enter__()
def steps():
    for _ in range(3):
        time.sleep(0.01)
        dog.beat()
"""


def run(work: str) -> subprocess.CompletedProcess[str]:
    code = PRELUDE + textwrap.dedent(work) + "\ntime.sleep(20)\n"
    return warm_start.run([sys.executable, "-c", code], timeout=19)


@pytest.mark.parametrize(
    ("work", "words"),
    [
        ("steps()", "another process is gone or hangs"),
        ("steps(); dog.waiting_for_data().__enter__()", "its images have not come"),
        # A grid that is known to take a moment: the next may not take the time of the first.
        (
            "steps()\nwith dog.task('grid'): time.sleep(0.02)\ndog.task('grid').__enter__()",
            "another process",
        ),
        # The first step also compiles; no more than the second may follow from that.
        ("time.sleep(1); dog.beat(); steps()", "another process is gone or hangs"),
    ],
    ids=["step", "data", "boundary", "first-step"],
)
def test_what_hangs_ends(work: str, words: str) -> None:
    done = run(work)
    assert done.returncode == 75
    assert words in done.stderr


def test_slow_steps_and_a_slow_first_evaluation_are_let_be() -> None:
    work = """
    steps()
    with dog.task("evaluation"): time.sleep(3)
    time.sleep(0.3); dog.beat()
    time.sleep(3); dog.beat()  # it may take 20 times the one before it, and so 6
    dog.close()
    import sys; sys.exit(0)
    """
    assert run(work).returncode == 0
