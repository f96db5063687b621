"""What every result file says about where it was measured."""

import datetime
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def cpu_model() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def describe(*packages: str) -> dict[str, Any]:
    """Return hardware, versions, date and command, as JSON."""
    from torch.backends.cpu import get_cpu_capability

    versions = {"python": platform.python_version()}
    for name in ("torch", "accelerate", "numpy", *packages):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "hardware": {
            "cpu": cpu_model(),  # clouds hide the generation; what it can do tells more
            "instructions": get_cpu_capability(),
            "cores": len(os.sched_getaffinity(0)),
        },
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", *map(str, sys.argv)]),
    }
