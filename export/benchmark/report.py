"""The results of a benchmark: a table on the terminal, a JSON file and a bar chart."""

import dataclasses
import datetime
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from export.benchmark.cases import BASELINE, Case
from export.benchmark.roofline import ImageCost, Rooflines, cost_of
from export.benchmark.timing import MeasurementSettings, Timings
from export.format.driver import driver_version
from pipeline.common.errors import escaped
from pipeline.common.machine import available_cores, processor, versions
from pipeline.common.storage import atomic_path, write_atomic
from pipeline.config import NetworkConfig
from pipeline.model.networks import build_generator

Row = dict[str, Any]
PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13")


def write_report(
    out: Path,
    cases: list[Case],
    timings: Timings,
    extras: dict[str, dict[str, float | None]],
    left_out: dict[str, str],
    rooflines: Rooflines,
    settings: MeasurementSettings,
    threads: int,
) -> Row:
    """Write `out`/bench.json and bench.png, print the tables; return the content of bench.json."""
    rows = make_rows(cases, timings, rooflines)
    content = {
        "title": "Sampling throughput",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["dcgan-export", *sys.argv[1:]]) if "dcgan-export" in sys.argv[0] else " ".join(sys.argv),
        "hardware": hardware(threads),
        "versions": versions(*PACKAGES),
        "rounds": settings.rounds,
        "rows": rows,
        "backends": [{"backend": label, **values} for label, values in extras.items()],
        "left_out": left_out,
        "ceilings": describe_rooflines(rooflines),
    }
    write_atomic(out / "bench.json", json.dumps(content, indent=1) + "\n")
    draw(rows, out / "bench.png")
    print_tables(content, out)
    return content


def make_rows(cases: list[Case], timings: Timings, rooflines: Rooflines) -> list[Row]:
    """Return one row for each batch size and backend, as a share of the roofline of its own device and arithmetic.

    A ratio is the median of the rounds' ratios to eager PyTorch, and None where eager ran another network.
    """
    by_label = {case.label: case for case in cases}
    costs = {network: _cost_of_network(network) for network in {case.network for case in cases}}
    rows = []
    for (label, batch), timing in sorted(timings.items(), key=lambda item: item[0][1]):
        case = by_label[label]
        cost, roofline = costs[case.network], rooflines[case.device, case.precision]
        rate = statistics.median(timing.rates)
        baseline = timings.get((BASELINE, batch))
        if baseline and by_label[BASELINE].network != case.network:
            baseline = None
        ratios = [one / other for one, other in zip(timing.rates, baseline.rates, strict=True)] if baseline else []
        value_bytes = 2 if case.precision == "fp16" else 4
        flops, traffic = rate * cost.flops_per_image, rate * cost.bytes_per_image(batch, value_bytes)
        row: Row = {
            "backend": label,
            "device": case.device,
            "precision": case.precision,
            "batch": batch,
            "images_per_second": round(rate, 1),
            "times_eager": round(statistics.median(ratios), 2) if ratios else None,
            "p50_ms": _percentile_ms(timing.latencies, 50),
            "p99_ms": _percentile_ms(timing.latencies, 99),
            "flops_per_image": cost.flops_per_image,
            "gflops_per_second": round(flops / 1e9, 1),
            "percent_of_compute": round(100 * flops / roofline.flops_per_second),
            "gbytes_per_second": round(traffic / 1e9, 2),
            "percent_of_memory": round(100 * traffic / roofline.copy_bytes_per_second),
        }
        if timing.device_seconds:
            row["device_p50_ms"] = _percentile_ms(timing.device_seconds, 50)
            row["device_p99_ms"] = _percentile_ms(timing.device_seconds, 99)
        rows.append(row)
    return rows


def _percentile_ms(seconds: list[float], percent: int) -> float:
    return round(1e3 * float(np.percentile(seconds, percent)), 4)


def _cost_of_network(network: NetworkConfig) -> ImageCost:
    """Count the cost of an image; it depends on the architecture alone."""
    return cost_of(build_generator(network).eval())


def describe_rooflines(rooflines: Rooflines) -> list[Row]:
    """Return the rooflines as JSON."""
    return [
        {"device": device, "precision": precision, **dataclasses.asdict(roofline)}
        for (device, precision), roofline in rooflines.items()
    ]


def hardware(threads: int) -> dict[str, str]:
    """Return what the benchmark ran on."""
    found = {"cpu": processor(), "cores": f"{available_cores()} cores", "threads": f"{threads} threads"}
    if driver_version() is not None:
        import torch

        if torch.cuda.is_available():
            found["gpu"] = f"{torch.cuda.get_device_name()}, driver CUDA {driver_version()}"
    return found


def print_tables(content: Row, out: Path) -> None:
    """Print the rows as tables for people."""
    from rich.console import Console
    from rich.table import Table

    # Piped output has no width of its own; 120 columns cut no cell.
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)
    table = Table(title=f"{content['title']} on {', '.join(content['hardware'].values())}")
    on_gpu = any("device_p50_ms" in row for row in content["rows"])
    headings = [
        "batch",
        "backend",
        "images/s",
        "× eager",
        "p50 ms",
        "p99 ms",
        *(["launch p50", "p99"] if on_gpu else []),
        "GFLOP/s",
        "of peak",
        "GB/s",
        "of peak",
    ]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    last = None
    for row in content["rows"]:
        if last not in (None, row["batch"]):
            table.add_section()
        last = row["batch"]
        table.add_row(
            str(row["batch"]),
            row["backend"],
            f"{row['images_per_second']:,.0f}",
            "" if row["times_eager"] is None else f"{row['times_eager']:.2f}",
            f"{row['p50_ms']:.2f}",
            f"{row['p99_ms']:.2f}",
            *([_number(row.get("device_p50_ms"), 3), _number(row.get("device_p99_ms"), 3)] if on_gpu else []),
            f"{row['gflops_per_second']:,.0f}",
            f"{row['percent_of_compute']} %",
            f"{row['gbytes_per_second']:.1f}",
            f"{row['percent_of_memory']} %",
        )
    console.print(table)
    if content["backends"]:
        console.print(_once_table(content["backends"]))
    for reason in dict.fromkeys(content["left_out"].values()):
        labels = ", ".join(label for label, why in content["left_out"].items() if why == reason)
        line = escaped(f"not measured: {labels}: {reason}")
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    console.print(f"wrote {out / 'bench.json'} and bench.png", highlight=False)


def _once_table(backends: list[Row]) -> Any:
    from rich.table import Table

    on_gpu = any("device_bytes" in row for row in backends)
    table = Table(title="Cold start of a fresh process, and the rate into JPEG files")
    for heading in (
        "backend",
        "cold start s",
        "peak memory MB",
        *(["GPU memory MB"] if on_gpu else []),
        "JPEG files/s",
    ):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    for row in backends:
        seconds = row["cold_start_seconds"]
        table.add_row(
            row["backend"],
            "failed" if seconds is None else f"{seconds:.1f}",
            _megabytes(row["peak_bytes"]),
            *([_megabytes(row.get("device_bytes"))] if on_gpu else []),
            f"{row['jpg_images_per_second']:,.0f}",
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:,.0f}"


def draw(rows: list[Row], path: Path) -> None:
    """Draw images/s as one group of bars for each batch size."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(row["backend"] for row in rows))
    batches = sorted({row["batch"] for row in rows})
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(labels)
    for index, label in enumerate(labels):
        rates = {row["batch"]: row["images_per_second"] for row in rows if row["backend"] == label}
        offsets = [batches.index(batch) + (index - (len(labels) - 1) / 2) * width for batch in rates]
        axes.bar(offsets, list(rates.values()), width * 0.92, label=label)
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.set_ylabel("images/s, in host memory")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, ncols=len(labels), loc="outside upper center")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
