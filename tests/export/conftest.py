"""Fixtures: a small exported model, and dcgan-export as users call it."""

import sys
from pathlib import Path

import pytest
from export_cases import MAX_BATCH, SMALL, Cli, Export, make_generator, write_checkpoint

from export.builders.onnx_model import export_onnx
from export.cli import main


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A 32-pixel generator as model.onnx, uint8, for batches up to 16. Read only."""
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = write_checkpoint(folder, SMALL)
    card = export_onnx(str(checkpoint), folder, max_batch=MAX_BATCH, parity_images=48)
    return Export(checkpoint, folder / "model.onnx", card, make_generator(SMALL))


@pytest.fixture
def copy(exported: Export, tmp_path: Path) -> Path:
    """A copy of `exported.model` with its card, to be damaged."""
    for path in (exported.model, exported.model.with_suffix(".json")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / exported.model.name


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `dcgan-export ARGUMENTS` and return (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dcgan-export", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return run
