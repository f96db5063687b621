"""The memory limits of the Jobs stand beside what their programs took, and leave room for it."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
STEPS: dict[str, dict[str, Any]] = json.loads((ROOT / "benchmarks/results/step_memory.json").read_text())["steps"]
ROW = re.compile(r"^ +\| `([a-z-]+)`(?:[:,] ([^|,]+))?[^|]*\| ([\d,]+) \| (\d+)Gi \|$", re.MULTILINE)


def limit_gib(manifest: str, container: str) -> int:
    """Return the memory limit of a container, which must be its request too."""
    pod = yaml.safe_load((ROOT / manifest).read_text())["spec"]["template"]["spec"]
    (resources,) = (
        found["resources"]
        for found in [*pod.get("initContainers", []), *pod["containers"]]
        if found["name"] == container
    )
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    return int(re.fullmatch(r"(\d+)Gi", resources["limits"]["memory"])[1])  # type: ignore[index]


def test_every_limit_leaves_room_and_is_documented() -> None:
    shown = {
        ", ".join(filter(None, (step, what.strip()))): (int(peak.replace(",", "")), int(limit))
        for step, what, peak, limit in ROW.findall((ROOT / "docs/operations.md").read_text())
    }
    expected = {
        name.replace(": ", ", "): (step["peak_mib"], limit_gib(step["manifest"], step["container"]))
        for name, step in STEPS.items()
    }
    assert shown == expected
    assert all(1024 * limit >= 1.5 * peak for peak, limit in expected.values())
