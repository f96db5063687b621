"""`dcgan-export bench --calibrate`: measures the backends that `auto` chooses from, and writes their speeds for it."""

import datetime
from pathlib import Path

from export.benchmark.report import Row
from export.benchmark.run import run_benchmark
from export.format.card import read_card
from export.format.speeds import ProcessorSpeeds, add_speeds
from export.samplers.choice import choose_cpu_backend, installed_cpu_backends
from pipeline.common.errors import UsageError
from pipeline.common.machine import available_threads, instructions, processor_kind, versions
from pipeline.common.storage import locate, require_writable


def calibrate(out: Path, model: str, *, batches: list[int], rounds: int, quick: bool, threads: int | None) -> list[str]:
    """Measure `model`, an ONNX file, into `out`, and its speeds into the table beside it. Return what people read.

    Raises UsageError for an engine, and for a folder that cannot be written; else as `run_benchmark`.
    """
    if not model.endswith(".onnx"):
        raise UsageError(f"--calibrate {model}: expected a .onnx; other models leave `auto` nothing to choose")
    card, threads = read_card(model), threads or available_threads()
    require_writable(locate(model)[0].location)
    fitting = [batch for batch in batches if batch <= card.max_batch]
    if not fitting:
        raise UsageError(f"--batch {min(batches)}: {model} takes at most {card.max_batch} images")
    content = run_benchmark(
        out,
        ckpt=None,
        models=[model],
        backends=installed_cpu_backends(),
        batches=fitting,
        rounds=rounds,
        quick=quick,
        threads=threads,
    )
    table = add_speeds(model, speeds_of(content["rows"], threads))
    chosen = [f"{batch}: {choose_cpu_backend(model, card, batch, threads).backend}" for batch in sorted(set(fitting))]
    return [
        f"wrote {table}",
        f"auto now takes, on this processor with --threads {threads}, at blocks of {', '.join(chosen)}",
    ]


def speeds_of(rows: list[Row], threads: int) -> ProcessorSpeeds:
    """Return what the rows of a benchmark say of the CPU's backends, as a row of a speed table."""
    backends = installed_cpu_backends()
    rates: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["backend"] in backends:
            rates.setdefault(row["batch"], {})[row["backend"]] = row["images_per_second"]
    return ProcessorSpeeds(
        processor=processor_kind(),
        instructions=instructions(),
        threads=threads,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        versions={name: version for name, version in versions(*backends).items() if name in backends},
        images_per_second=rates,
    )
