"""The trackers of a run, each with what it is to get."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipeline.common.errors import DataError
from pipeline.common.records import parse_json
from pipeline.training.trackers.mlflow_run import MlflowRun
from pipeline.training.trackers.outbox import TRACKED, Config, Outbox, Tracker, flat_config, is_tracked, new_id
from pipeline.training.trackers.weights_biases import WandbRun

TRACKERS: dict[str, Callable[[Path, str, Config], Tracker]] = {"wandb": WandbRun, "mlflow": MlflowRun}


def open_outboxes(names: Iterable[str], run: Path, description: dict[str, Any], images_seen: int) -> list[Outbox]:
    """Return what sends to the trackers in `names`, and put the id of the run's records into `description`.

    `description` holds the id that the run's checkpoint names. A run that is tracked since that checkpoint has it in
    its config.json; one that has saved nothing gets a new one, because nothing was sent of it.
    """
    if images_seen and TRACKED not in description and (known := _in_config(run / "config.json")):
        description[TRACKED] = known
    chosen = [TRACKERS[name] for name in names if name in TRACKERS]
    if not chosen:
        return []
    description.setdefault(TRACKED, new_id())
    config = flat_config(description)
    return [Outbox(tracker(run, description[TRACKED], config), run, images_seen) for tracker in chosen]


def _in_config(path: Path) -> str | None:
    try:
        content = parse_json(path.read_bytes(), str(path))
    except (OSError, DataError):
        return None
    tracked = content.get(TRACKED) if isinstance(content, dict) else None
    return tracked if is_tracked(tracked) else None
