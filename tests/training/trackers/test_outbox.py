"""What a tracker gets of a run: each step once, up to what is saved, whatever failed or was killed meanwhile."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.common.errors import UnavailableError, UsageError
from pipeline.config import load_config
from pipeline.training.trackers import names
from pipeline.training.trackers.names import check_trackers
from pipeline.training.trackers.open import open_outboxes
from pipeline.training.trackers.outbox import TRACKED, Outbox, flat_config


class Server:
    """A tracker that holds its records in memory, and can be told to fail."""

    name = "memory"

    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float], str | None]] = []
        self.fails_at: int | None = None
        self.opened = self.closed = 0

    def open(self) -> int:
        self.opened += 1
        return max((step for step, _, _ in self.records), default=-1)

    def log(self, step: int, values: dict[str, float], picture: Path | None) -> None:
        if step == self.fails_at:
            raise ConnectionError("the server went away\nsecond line")
        self.records.append((step, values, picture.name if picture else None))

    def close(self) -> None:
        self.closed += 1

    @property
    def steps(self) -> list[int]:
        return [step for step, _, _ in self.records]


def begin(run: Path, server: Server, images_seen: int) -> Outbox:
    return Outbox(server, run, images_seen)


def end(outbox: Outbox) -> None:
    outbox.close(time.monotonic() + 60)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of which nothing is sent: two lines at 64, as where it was evaluated, and grids at 0 and 64."""
    lines = [{"images": 32, "loss_d": 1.0}, {"images": 64, "loss_d": 2.0}, {"images": 64, "swd": 3.0}]
    lines += [{"images": 96, "loss_d": 4.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "samples").mkdir()
    for step in (0, 64, 128):
        (tmp_path / f"samples/{step:09d}.png").touch()
    return tmp_path


def test_a_step_is_one_record_with_all_its_values(run: Path) -> None:
    server = Server()
    outbox = begin(run, server, 64)
    outbox.send(64)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"images": 128, "loss_d": 5.0}\n{"images": 160, "lo')
    outbox.drew(run / "samples" / "000000128.png")
    outbox.send(160)
    end(outbox)
    assert server.records == [
        (0, {}, "000000000.png"),
        (32, {"loss_d": 1.0}, None),
        (64, {"loss_d": 2.0, "swd": 3.0}, "000000064.png"),
        (96, {"loss_d": 4.0}, None),
        (128, {"loss_d": 5.0}, "000000128.png"),
    ]
    assert (server.opened, server.closed) == (1, 1)


def test_nothing_is_sent_that_no_checkpoint_holds(run: Path) -> None:
    server = Server()
    outbox = begin(run, server, 64)  # the grid at 128 is of a start that was killed
    outbox.send(64)
    end(outbox)
    assert server.steps == [0, 32, 64]
    untouched = Server()
    end(begin(run, untouched, 64))
    assert (untouched.opened, untouched.closed) == (0, 0)


def test_a_failure_is_one_line_and_the_next_start_sends_the_rest(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    server.fails_at = 64
    outbox = begin(run, server, 96)
    outbox.send(64)
    outbox.send(96)
    end(outbox)
    assert server.steps == [0, 32]
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("pipeline")]
    assert line.startswith("memory: the server went away; the run continues without it")
    server.fails_at = None
    outbox = begin(run, server, 96)
    outbox.send(96)
    end(outbox)
    assert server.steps == [0, 32, 64, 96]


def test_a_tracker_that_is_ahead_of_the_checkpoint_gets_no_step_twice(run: Path) -> None:
    server = Server()
    server.records = [(32, {}, None), (64, {}, None)]
    outbox = begin(run, server, 32)
    outbox.send(96)
    end(outbox)
    assert server.steps == [32, 64, 96]


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "find_spec", lambda name: None if name == "wandb" else object())
    assert check_trackers("") == ()
    assert check_trackers("tensorboard, tensorboard,") == ("tensorboard",)
    with pytest.raises(UsageError, match="--log-with comet: no such tracker; expected some of tensorboard, wandb"):
        check_trackers("tensorboard,comet")
    with pytest.raises(UnavailableError, match=r"pip install 'dcgan-pipeline\[trackers\]'"):
        check_trackers("wandb")
    with pytest.raises(UsageError, match="MLFLOW_TRACKING_URI is not set"):
        check_trackers("mlflow", {})
    assert check_trackers("mlflow", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}) == ("mlflow",)


def test_the_id_is_that_of_the_checkpoint_then_of_config_json(tmp_path: Path) -> None:
    def found(images_seen: int, saved: object = None, stored: object = None) -> object:
        description: dict[str, Any] = {"config": load_config().model_dump(), "dataset": {"images": 5}}
        description |= {TRACKED: saved} if saved else {}
        (tmp_path / "config.json").write_text(json.dumps({TRACKED: stored} if stored else {}))
        open_outboxes(["wandb"], tmp_path, description, images_seen)
        return description[TRACKED]

    one, other = "0" * 16, "1" * 16
    assert found(64, one, other) == one
    assert found(64, None, other) == other
    assert found(0, None, other) not in (other, found(0))  # nothing is sent before the first checkpoint
    assert found(64, None, "../" + one) not in (one, other)
    description: dict[str, Any] = {"config": load_config().model_dump(), "dataset": {"images": 5}}
    assert open_outboxes(["tensorboard"], tmp_path, description, 0) == []
    assert TRACKED not in description


def test_settings_are_numbers_and_words() -> None:
    flat = flat_config({"config": load_config().model_dump(), "dataset": {"images": 5, "source": {"kind": "x"}}})
    assert flat["recipe.batch"] == 128
    assert flat["dataset.source"] == '{"kind": "x"}'
    assert all(isinstance(value, str | int | float) for value in flat.values())
