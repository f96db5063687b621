"""The control learns what is planted, draws its settings evenly, and goes on where it was interrupted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from planted import NETWORK, planted

from pipeline.evaluation.paper.probing import supervised
from pipeline.evaluation.paper.probing.supervised import (
    LEARNING_RATES,
    WEIGHT_DECAYS,
    Split,
    SupervisedNet,
    best_of,
    search,
    settings,
    trials_file,
)
from pipeline.model.networks import build_discriminator


def split(count: int, seed: int) -> Split:
    images, columns = planted(count, seed)
    return Split(images, np.array(columns["disc"], np.int64))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "STEPS", 60)
    monkeypatch.setattr(supervised, "EVERY", 20)


def test_it_learns_what_is_planted_and_nothing_of_labels_that_mean_nothing(short: None, tmp_path: Path) -> None:
    learn, validation, test = split(400, 1), split(200, 2), split(200, 3)
    trials = search(NETWORK, learn, validation, test, 3, 0, tmp_path / "planted.jsonl", "a")
    assert best_of(trials).test > 0.85
    assert best_of(trials).validation == max(trial.validation for trial in trials)
    coins = np.random.default_rng(0).integers(0, 2, 800)
    shuffled = Split(learn.images, coins[400:]), Split(validation.images, coins[:200]), Split(test.images, coins[:200])
    trials = search(NETWORK, *shuffled, 1, 0, tmp_path / "coins.jsonl", "a")
    assert trials[0].test == pytest.approx(0.5, abs=0.11)  # three deviations of 200 coins


def test_an_interrupted_search_goes_on_and_another_one_begins_anew(short: None, tmp_path: Path) -> None:
    parts = split(64, 1), split(32, 2), split(32, 3)
    file = tmp_path / trials_file("a")
    whole = search(NETWORK, *parts, 2, 0, tmp_path / "whole.jsonl", "a")
    search(NETWORK, *parts, 1, 0, file, "a")
    with file.open("a") as lines:
        lines.write('{"trial": 1, "learn')  # a damaged line
    assert search(NETWORK, *parts, 2, 0, file, "a") == whole
    kept = file.read_bytes()
    assert search(NETWORK, *parts, 2, 0, file, "a") == whole
    assert file.read_bytes() == kept == (tmp_path / "whole.jsonl").read_bytes()
    assert search(NETWORK, *parts, 1, 1, file, "b")[0].learning_rate != whole[0].learning_rate
    assert len(file.read_text().splitlines()) == 2
    assert trials_file("b") != file.name, "another protocol beside it leaves these trials alone"


def test_fewer_trials_remove_none_and_a_damaged_file_counts_as_empty(short: None, tmp_path: Path) -> None:
    parts = split(64, 1), split(32, 2), split(32, 3)
    file = tmp_path / trials_file("a")
    whole = search(NETWORK, *parts, 2, 0, file, "a")
    kept = file.read_bytes()
    assert search(NETWORK, *parts, 1, 0, file, "a") == whole[:1]
    assert file.read_bytes() == kept
    file.write_bytes(b"\xff\xfe\0")
    assert search(NETWORK, *parts, 1, 0, file, "a") == whole[:1]


def test_an_interrupted_first_trial_leaves_nothing(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(supervised, "_accuracy", interrupted)
    parts = split(64, 1), split(32, 2), split(32, 3)
    with pytest.raises(KeyboardInterrupt):
        search(NETWORK, *parts, 2, 0, tmp_path / trials_file("a"), "a")
    assert not list(tmp_path.iterdir())


def test_settings_are_log_uniform_in_their_ranges() -> None:
    drawn = np.log([settings(0, trial) for trial in range(2000)])
    for values, (low, high) in zip(drawn.T, np.log([LEARNING_RATES, WEIGHT_DECAYS]), strict=True):
        assert low <= values.min() < values.max() <= high
        quarters = np.histogram(values, 4, (low, high))[0]
        assert np.abs(quarters - 500).max() < 80  # four deviations
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.09


def test_it_is_d_without_its_last_layer() -> None:
    network = SupervisedNet(NETWORK, 5)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    d = build_discriminator(NETWORK)
    head = sum(weight.numel() for weight in d.get_submodule("head").parameters())
    own = sum(weight.numel() for weight in network.trunk.parameters())
    assert own == sum(weight.numel() for weight in d.parameters())
    assert network.head.weight.shape == (5, head)
