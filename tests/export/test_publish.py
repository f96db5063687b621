"""dcgan-export publish: a model travels with its card, or not at all."""

from collections.abc import Callable
from pathlib import Path

from export.format.card import read_model


def test_a_published_model_is_the_same(copy: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    target = tmp_path / "bucket/model"
    code, out, _ = cli("publish", "--model", copy, "--to", target)
    assert code == 0
    assert str(target) in out
    assert read_model(str(target / copy.name)) == read_model(str(copy))


def test_a_damaged_model_is_not_published(copy: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    copy.write_bytes(copy.read_bytes()[:-1])
    code, _, error = cli("publish", "--model", copy, "--to", tmp_path / "bucket")
    assert code == 65
    assert "cut short" in error
    assert not (tmp_path / "bucket").exists()
