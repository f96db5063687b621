"""Which CPU backend `auto` takes for an ONNX file: the fastest of a table, never by a timing of its own."""

import importlib.util
import math
from dataclasses import dataclass

from export.format.card import Card
from export.format.speeds import ProcessorSpeeds, our_speeds, read_speeds, speeds_name
from pipeline.common.errors import DataError, UnavailableError
from pipeline.common.machine import Instructions, instructions, processor_kind

CPU_BACKENDS = ("openvino", "onnxruntime")
"""Backends that run an ONNX file on the CPU. Of two that are equally fast, the first is taken."""
EQUALLY_FAST = 0.98
"""Rates closer than this are the same: "eager, again" of benchmarks/sampling.py differs by more from itself."""
LIKE: dict[Instructions, tuple[Instructions, ...]] = {
    "amx": ("amx", "avx512", "avx2"),
    "avx512": ("avx512", "avx2"),
    "avx2": ("avx2",),
    "other": (),
}
"""Of a processor with these instructions: whose measurements count, the best first."""


@dataclass(frozen=True)
class Choice:
    """A backend, and for people why it was taken."""

    backend: str
    reason: str


def choose_cpu_backend(model: str, card: Card, batch: int, threads: int) -> Choice:
    """Return the backend for blocks of `batch` images of the ONNX file `model`, a path or URL.

    The speed table beside the model decides if it has this processor with as many threads, else the table in this
    package, by the processor's instructions.

    Raises DataError for a speed table of another network; UnavailableError when no backend is installed.
    """
    installed = installed_cpu_backends()
    table = read_speeds(model)
    if table is not None and not table.fits(card):
        raise DataError(
            f"{speeds_name(model)}: measured with another network than {model}'s; delete it, or measure again: "
            f"dcgan-export bench --calibrate --model {model} --out FOLDER"
        )
    here = (processor_kind(), threads)
    for row in table.processors if table else []:
        if (row.processor, row.threads) == here and (backend := _fastest(row, batch, installed)):
            return Choice(backend, f"the fastest here at blocks of {batch}, by {speeds_name(model)}")
    ours = {row.instructions: row for row in our_speeds().processors}
    kind = instructions()
    like = next((other for other in LIKE[kind] if other in ours), None)
    if like is None or (backend := _fastest(ours[like], batch, installed)) is None:
        return Choice(installed[0], f"not measured on a processor like this one ({processor_kind()})")
    where = f"with {like}" if like == kind else f"with {like}; none with {kind} was measured"
    return Choice(backend, f"the fastest at blocks of {batch} on a processor {where}")


def _fastest(row: ProcessorSpeeds, batch: int, installed: list[str]) -> str | None:
    """Return the fastest of the backends that are `installed`, at the measured block size nearest to `batch`."""
    nearest = min(sorted(row.images_per_second), key=lambda size: abs(math.log(size / batch)))
    rates = {name: rate for name, rate in row.images_per_second[nearest].items() if name in installed}
    fast = EQUALLY_FAST * max(rates.values(), default=0.0)
    return next((name for name in installed if name in rates and rates[name] >= fast), None)


def installed_cpu_backends() -> list[str]:
    """Return the installed backends that run an ONNX file on the CPU. Raises UnavailableError without any."""
    found = [name for name in CPU_BACKENDS if importlib.util.find_spec(name)]
    if not found:
        raise UnavailableError("running an ONNX file needs OpenVINO or ONNX Runtime: pip install openvino onnxruntime")
    return found
