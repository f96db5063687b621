"""The data class that the GPU tests share."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.model.networks import Generator


@dataclass(frozen=True)
class Weights:
    """A generator of the tutorials' size and the file that it was saved to."""

    generator: Generator
    path: Path
