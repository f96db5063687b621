"""Stands in for the trainer in the launcher's tests: does as its first argument says. No heavy imports."""

import os
import pathlib
import signal
import sys
import time

what, folder = sys.argv[1], pathlib.Path(sys.argv[2])
rank = os.environ.get("RANK", "0")


def note(event: str) -> None:
    with (folder / f"rank-{rank}").open("a") as file:
        file.write(event + "\n")


def stop(number: int, frame: object) -> None:
    note(f"got {signal.Signals(number).name}")
    if number == signal.SIGTERM:
        time.sleep(0.5)  # saving
        note("saved")
        sys.exit(143)
    if number == signal.SIGINT:
        if what == "rank-0-saves" and rank == "0":
            time.sleep(1)
        sys.exit(130)


def wait_for_all() -> None:
    """Return when every process has installed its handlers and said so."""
    files = [folder / f"rank-{peer}" for peer in range(int(os.environ["WORLD_SIZE"]))]
    while not all(file.exists() and file.read_text().count("\n") >= 2 for file in files):
        time.sleep(0.01)


for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, stop)
if what == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
note(f"pid {os.getpid()}")
SHOWN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
note(" ".join(f"{name}={os.environ[name]}" for name in SHOWN if name in os.environ))
if what == "exit":
    sys.exit(int(sys.argv[3]))
if what == "codes":  # one for each start; a negative one is a signal that kills
    starts = (folder / f"rank-{rank}").read_text().count("pid ")
    code = int(sys.argv[2 + starts])
    files = [folder / f"rank-{peer}" for peer in range(int(os.environ.get("WORLD_SIZE", "1")))]
    while not all(file.exists() and file.read_text().count("pid ") == starts for file in files):
        time.sleep(0.01)
    if code < 0:
        os.kill(os.getpid(), -code)
    if code != 999:
        sys.exit(code)
if what == "rank-1-fails" and rank == "1":
    wait_for_all()
    sys.exit(65)
if what == "rank-1-is-killed" and rank == "1":
    wait_for_all()
    os.kill(os.getpid(), signal.SIGKILL)
if what == "orphan":
    os.system("sleep 1 & true")  # outlives its parent
    sys.exit(0)
if what == "deaf" and rank == "1":
    wait_for_all()
    sys.exit(69)
time.sleep(280)
