"""What the GPU tests pass around."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.model.networks import Generator


@dataclass(frozen=True)
class Weights:
    """A generator of the tutorials' size and the file that it was saved to."""

    generator: Generator
    path: Path
