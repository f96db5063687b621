"""The overlays of the repository, and variants of them with other components, rendered by kustomize."""

import os
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = sorted(path.name for path in (ROOT / "k8s/overlays").iterdir())
TRAINERS = ("jobset", "trainjob")
"""Components that train by something else than a Job; an overlay has one of them at most."""
BEFORE = {"index": "settings", "metrics": "edit", "priority": "settings"}
"""Components that others change, or read, and what they stand before. The others come last, in the order given."""


@cache
def kustomize(folder: Path) -> str:
    """Return what `kubectl apply -k` would send."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(folder: Path) -> list[dict[str, Any]]:
    """Return the objects of an overlay."""
    return list(yaml.safe_load_all(kustomize(folder)))


def variant(overlay: Path, folder: Path, components: Iterable[str], *, without: Iterable[str] = TRAINERS) -> Path:
    """Write an overlay with other components to `folder`, as a user would edit its list; return the folder."""
    kustomization = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    names = [path for path in kustomization["components"] if Path(path).name not in {*without, *components}]
    for component in components:
        place = next((i for i, path in enumerate(names) if Path(path).name == BEFORE.get(component)), len(names))
        names.insert(place, f"../../components/{component}")
    kustomization["components"] = names
    folder.mkdir(parents=True)
    for key in ("resources", "components"):
        kustomization[key] = [os.path.relpath(overlay / path, folder) for path in kustomization[key]]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder
