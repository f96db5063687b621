"""The names that `--log-with` takes, and what each needs."""

import os
from collections.abc import Mapping
from importlib.util import find_spec

from pipeline.common.errors import UnavailableError, UsageError

EXTRAS = {"tensorboard": "eval", "wandb": "trackers", "mlflow": "trackers"}
"""The trackers, each the name of its module, and the extra that installs it."""
MLFLOW_ADDRESS = "MLFLOW_TRACKING_URI"


def check_trackers(names: str, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the trackers in `names`, which commas separate, each once.

    Raises UsageError for another name and for MLflow without an address, UnavailableError for a missing package.
    """
    found = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in found:
        if name not in EXTRAS:
            raise UsageError(f"--log-with {name}: no such tracker; expected some of {', '.join(EXTRAS)}, with commas")
        if find_spec(name) is None:
            raise UnavailableError(
                f"--log-with {name}: the package {name} is not installed; pip install 'dcgan-pipeline[{EXTRAS[name]}]'"
            )
    if "mlflow" in found and not environment.get(MLFLOW_ADDRESS):
        raise UsageError(
            f"--log-with mlflow: {MLFLOW_ADDRESS} is not set; expected the server's address, such as "
            f"{MLFLOW_ADDRESS}=http://127.0.0.1:5000"
        )
    return found
