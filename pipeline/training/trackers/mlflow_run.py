"""A run on an MLflow server."""

import os
import re
from pathlib import Path
from typing import Any

from pipeline.training.trackers.outbox import Config

TAG = "dcgan.run"
"""The tag by which a run is found again."""
PICTURES = "samples"


class MlflowRun:
    """Through accelerate's tracker. MLFLOW_TRACKING_URI names the server."""

    name = "mlflow"

    def __init__(self, run: Path, tracked: str, config: Config) -> None:
        """`tracked` goes into the run's tag."""
        self._run = run
        self._tracked = tracked
        self._config = config
        self._tracker: Any = None
        self._client: Any = None
        self._pictures: set[int] = set()

    def open(self) -> int:
        """See `Tracker`. The server is asked for the run of that tag and for its last step."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before its import
        import mlflow
        from accelerate.tracking import MLflowTracker

        self._client = client = mlflow.MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "dcgan"
        known = client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else client.create_experiment(experiment)
        runs = client.search_runs([number], f"tags.`{TAG}` = '{self._tracked}'")
        self._tracker = MLflowTracker(
            experiment,
            run_id=runs[0].info.run_id if runs else None,
            run_name=None if runs else self._run.resolve().name,
            tags=None if runs else {TAG: self._tracked},
        )
        self._tracker.start()
        data = runs[0].data if runs else None
        self._store_config(data.params if data else {})
        if data is None:
            return -1
        self._pictures = set(self._steps_of_pictures())
        histories = (client.get_metric_history(self._id, name) for name in data.metrics)
        return max((point.step for history in histories for point in history), default=-1)

    @property
    def _id(self) -> str:
        return str(self._tracker.tracker.info.run_id)

    def _store_config(self, stored: dict[str, str]) -> None:
        """Store what is not there. A parameter never changes on the server: a changed setting becomes a tag."""
        self._tracker.store_init_configuration({k: v for k, v in self._config.items() if k not in stored})
        for key, value in self._config.items():
            if stored.get(key, str(value)) != str(value):
                self._client.set_tag(self._id, f"changed.{key}", str(value))

    def _steps_of_pictures(self) -> list[int]:
        names = (entry.path for entry in self._client.list_artifacts(self._id, "images"))
        found = (re.search(rf"{PICTURES}[+%]step[+%](\d+)[+%]", name) for name in names)
        return [int(match[1]) for match in found if match]

    def log(self, step: int, values: dict[str, float], picture: Path | None) -> None:
        """See `Tracker`. The picture first: a step is there when its values are."""
        if picture is not None and step not in self._pictures:
            from PIL import Image

            with Image.open(picture) as opened:
                self._client.log_image(self._id, opened, key=PICTURES, step=step, synchronous=True)
        if values:
            self._tracker.log(values, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._tracker.finish()
