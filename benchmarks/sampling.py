"""How fast each backend samples on this CPU, and whether `auto` chooses the fastest.

    python benchmarks/sampling.py

Width 64, 64x64 pixels, float32, images in host memory as uint8. Baseline: eager PyTorch in inference mode.

1. `dcgan-export bench --calibrate` measures the backends of an ONNX file; what `auto` takes afterwards is noted.
2. All backends take turns in random order for 15 rounds, in a measurement of its own; results are medians of the
   rounds' ratios. "eager, again" is the A/A control. The targets are for what `auto` takes.

Writes benchmarks/results/sampling_KIND.{json,png}, where KIND is the processor's instructions, and its rates into
export/format/measured.json, by which `auto` chooses where nobody calibrated. Exits with 1 when a target is missed.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from hardware import describe  # benchmarks/hardware.py

from export.benchmark.calibration import calibrate, speeds_of
from export.benchmark.cases import BASELINE, CONTROL, Case, choose_cases
from export.benchmark.report import describe_rooflines, draw, make_rows
from export.benchmark.roofline import Roofline, Rooflines
from export.benchmark.run import measure, measure_rooflines
from export.benchmark.timing import MeasurementSettings, Timings
from export.builders.onnx_model import export_onnx
from export.format.speeds import our_speeds
from export.samplers.choice import choose_cpu_backend
from pipeline.checkpoints.weights import serialize
from pipeline.common.machine import available_threads, instructions
from pipeline.config import NetworkConfig
from pipeline.model.networks import build_generator, initialize

RESULTS = Path(__file__).parent / "results"
TABLE = Path(__file__).parent.parent / "export" / "format" / "measured.json"
BATCHES = [1, 8, 64, 256]
LEAST_TIMES_EAGER = {1: 2.4, 64: 1.4, 256: 1.4}
WITHIN_OF_BEST = 0.95


def main() -> None:
    """Make a generator, measure it, write the result, and compare it with the targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turn-seconds", type=float, default=0.3)
    options = parser.parse_args()
    threads = available_threads()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_generator(Path(folder))
        card = export_onnx(str(checkpoint), Path(folder), parity_images=512)
        model = str(Path(folder) / card.file)
        untold = {batch: choose_cpu_backend(model, card, batch, threads).backend for batch in BATCHES}
        calibrate(Path(folder), model, batches=BATCHES, rounds=options.rounds, quick=False, threads=threads)
        auto = {batch: choose_cpu_backend(model, card, batch, threads).backend for batch in BATCHES}
        cases, left_out = choose_cases(str(checkpoint), [model], [], quick=False)
        before = measure_rooflines(cases)
        timings, too_large = measure(
            cases, BATCHES, MeasurementSettings(options.rounds, options.turn_seconds, 3), threads
        )
        rooflines = best(before, measure_rooflines(cases))
    rows = make_rows(cases, timings, rooflines)
    verdicts = check_targets(timings, cases, auto)
    content = {
        "title": "Sampling on a CPU, width 64, 64x64",
        **describe("onnxruntime", "openvino"),
        "threads": threads,
        "rounds": options.rounds,
        "auto": auto,
        "auto_before_calibration": untold,
        "verdicts": verdicts,
        "rows": rows,
        "ceilings": describe_rooflines(rooflines),
        "left_out": left_out | too_large,
        "parity": [proven.model_dump() for proven in card.parity],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"sampling_{instructions()}.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(rows, RESULTS / f"sampling_{instructions()}.png")
    write_table(rows, threads)
    for row in rows:
        print(
            f"{row['batch']:4} {row['backend']:14} {row['images_per_second']:8,.0f}/s  x{row['times_eager']:.2f}  "
            f"p50 {row['p50_ms']:8.2f} ms  p99 {row['p99_ms']:8.2f} ms  {row['percent_of_compute']:3} % of the roofline"
        )
    for verdict in verdicts:
        print(("held   " if verdict["held"] else "MISSED ") + verdict["claim"] + f": {verdict['measured']:.2f}")
    sys.exit(not all(verdict["held"] for verdict in verdicts))


def write_table(rows: list[dict[str, Any]], threads: int) -> None:
    """Put the rates into the table that `auto` falls back on, in place of those of such a processor."""
    table, row = our_speeds(), speeds_of(rows, threads)
    others = [one for one in table.processors if one.instructions != row.instructions]
    table = table.model_copy(update={"processors": [*others, row]})
    TABLE.write_text(table.model_dump_json(indent=1) + "\n")


def write_generator(folder: Path) -> Path:
    """Write the tutorials' generator with random weights and measured BatchNorm statistics."""
    config = NetworkConfig(width=64)
    generator = build_generator(config)
    initialize(generator, 0, lane=0)
    with torch.no_grad():
        for _ in range(10):
            generator(torch.rand(64, config.latent_dim) * 2 - 1)
    path = folder / "generator.safetensors"
    path.write_bytes(serialize(generator.eval(), config, "raw", 0))
    return path


def best(one: Rooflines, other: Rooflines) -> Rooflines:
    """Return the higher of two measurements of each roofline, because other load can only lower them."""
    return {
        key: Roofline(
            max(one[key].flops_per_second, other[key].flops_per_second),
            max(one[key].copy_bytes_per_second, other[key].copy_bytes_per_second),
        )
        for key in one
    }


def check_targets(timings: Timings, cases: list[Case], auto: dict[int, str]) -> list[dict[str, Any]]:
    """Compare what `auto` takes with its targets by medians of the rounds' ratios, not by ratios of medians."""

    def ratio(one: str, other: str, batch: int) -> float:
        pairs = zip(timings[one, batch].rates, timings[other, batch].rates, strict=True)
        return statistics.median(a / b for a, b in pairs)

    verdicts: list[dict[str, Any]] = []
    for batch, target in LEAST_TIMES_EAGER.items():
        measured = ratio(auto[batch], BASELINE, batch)
        claim = f"auto ({auto[batch]}) at batch {batch} is at least {target} times eager"
        verdicts.append({"claim": claim, "measured": round(measured, 3), "held": measured >= target})
    for batch in BATCHES:
        others = [case.label for case in cases if case.label not in (auto[batch], CONTROL)]
        rival = min(others, key=lambda label: ratio(auto[batch], label, batch))
        measured = ratio(auto[batch], rival, batch)
        claim = f"auto ({auto[batch]}) at batch {batch} is within 5 % of the best other, {rival}"
        verdicts.append({"claim": claim, "measured": round(measured, 3), "held": measured >= WITHIN_OF_BEST})
    return verdicts


if __name__ == "__main__":
    main()
