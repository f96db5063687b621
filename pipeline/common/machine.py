"""What this process may use of its machine, and which versions it runs."""

import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path


def available_cores() -> int:
    """Return the cores that this process may use: its affinity, or the container's CPU limit where that is lower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    groups = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # "max" where there is no limit
        quota, period = (groups / "cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    with suppress(OSError, ValueError):  # the same before version 2 of cgroups, -1 where there is no limit
        quota, period = ((groups / f"cpu/cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
        cores = min(cores, max(1, int(quota) // int(period))) if int(quota) > 0 else cores
    return cores


def available_threads() -> int:
    """Return OMP_NUM_THREADS where it is set, else the available cores."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else available_cores()


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of `packages`, of Python and of this project."""
    found = {"python": platform.python_version()}
    for package in ("dcgan-pipeline", *packages):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
