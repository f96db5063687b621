"""A way to run dcgan-data as a user does."""

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from pipeline.data.cli import main


@dataclass
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def dcgan_data(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Finished]]:
    """Run a command line in this process: dcgan_data("build", "folder", src, out)."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["dcgan-data", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return Finished(code, captured.out, captured.err)

    yield run
    signal.signal(signal.SIGTERM, handler)
