"""How long a benchmark measures, and the times that it collects."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class MeasurementSettings:
    """How long to measure each case."""

    rounds: int
    turn_seconds: float
    """Length of the turn that each case gets in a round."""
    warm_up_blocks: int
    """Blocks that each sampler makes before its first turn."""


@dataclass
class Timing:
    """Times of one case at one batch size."""

    rates: list[float] = field(default_factory=list)
    """Images/s of each round; images in host memory."""
    latencies: list[float] = field(default_factory=list)
    """Seconds of single blocks."""
    device_seconds: list[float] = field(default_factory=list)
    """Seconds of single launches by CUDA events, without copies."""


Timings = dict[tuple[str, int], Timing]
"""By label of the case and batch size."""
