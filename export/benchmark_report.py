"""The outcome of a benchmark as a table on the terminal, as JSON, and as a picture."""

import datetime
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.card import versions
from export.driver import driver_version
from pipeline.storage import atomic_path, write_atomic

if TYPE_CHECKING:
    from export.benchmark import Effort, Timing
    from export.ceilings import Work

Row = dict[str, Any]
PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13")


def write_report(
    out: Path,
    timings: "dict[tuple[str, int], Timing]",
    extras: dict[str, dict[str, float | None]],
    left_out: dict[str, str],
    work: "Work",
    limits: dict[str, float],
    effort: "Effort",
    threads: int,
) -> Row:
    """Write `out`/bench.json and bench.png, print the tables; return the content of bench.json."""
    import json

    rows = make_rows(timings, work, limits)
    content = {
        "title": "Sampling throughput",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["dcgan-export", *sys.argv[1:]]) if "dcgan-export" in sys.argv[0] else " ".join(sys.argv),
        "hardware": hardware(threads),
        "versions": versions(*PACKAGES),
        "rounds": effort.rounds,
        "rows": rows,
        "backends": [{"backend": label, **values} for label, values in extras.items()],
        "left_out": left_out,
        "ceilings": limits,
        "work": {
            "flops_per_image": work.flops_per_image,
            "feature_map_values_per_image": work.values_per_image,
            "weights": work.weights,
        },
    }
    write_atomic(out / "bench.json", json.dumps(content, indent=1) + "\n")
    draw(rows, out / "bench.png")
    print_tables(content, out)
    return content


def make_rows(timings: "dict[tuple[str, int], Timing]", work: "Work", limits: dict[str, float]) -> list[Row]:
    """Return one row a batch size and backend; ratios are medians of the rounds' ratios to eager PyTorch."""
    from export.benchmark import BASELINE

    rows = []
    for (label, batch), timing in sorted(timings.items(), key=lambda item: item[0][1]):
        rate = statistics.median(timing.rates)
        baseline = timings.get((BASELINE, batch))
        ratios = [one / other for one, other in zip(timing.rates, baseline.rates, strict=True)] if baseline else []
        half = "fp16" in label and "flops_per_second_fp16" in limits
        flops, traffic = rate * work.flops_per_image, rate * work.bytes_per_image(batch, 2 if half else 4)
        row: Row = {
            "backend": label,
            "batch": batch,
            "images_per_second": round(rate, 1),
            "times_eager": round(statistics.median(ratios), 2) if ratios else None,
            "p50_ms": round(1e3 * float(np.percentile(timing.latencies, 50)), 3),
            "p99_ms": round(1e3 * float(np.percentile(timing.latencies, 99)), 3),
            "gflops_per_second": round(flops / 1e9, 1),
            "percent_of_compute": round(100 * flops / limits["flops_per_second_fp16" if half else "flops_per_second"]),
            "gbytes_per_second": round(traffic / 1e9, 2),
            "percent_of_memory": round(100 * traffic / limits["copy_bytes_per_second"]),
        }
        if timing.device_seconds:
            row["device_p50_ms"] = round(1e3 * statistics.median(timing.device_seconds), 4)
        rows.append(row)
    return rows


def hardware(threads: int) -> dict[str, str]:
    """Return what the benchmark ran on."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    found = {"cpu": cpu, "cores": f"{len(os.sched_getaffinity(0))} cores", "threads": f"{threads} threads"}
    if driver_version() is not None:
        import torch

        if torch.cuda.is_available():
            found["gpu"] = f"{torch.cuda.get_device_name()}, driver CUDA {driver_version()}"
    return found


def print_tables(content: Row, out: Path) -> None:
    """Print the rows as people read them."""
    from rich.console import Console
    from rich.table import Table

    # Piped output has no width of its own; wide enough that no cell is cut.
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"{content['title']} on {', '.join(content['hardware'].values())}")
    headings = [
        "batch",
        "backend",
        "images/s",
        "× eager",
        "p50 ms",
        "p99 ms",
        "GFLOP/s",
        "of limit",
        "GB/s",
        "of limit",
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
        console.print(f"not measured: {labels}: {reason}", style="dim", highlight=False, soft_wrap=True)
    console.print(f"wrote {out / 'bench.json'} and bench.png", highlight=False)


def _once_table(backends: list[Row]) -> Any:
    from rich.table import Table

    table = Table(title="A fresh process until its first images; into JPEG files")
    for heading in ("backend", "cold start s", "peak memory MB", "JPEG files/s"):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    for row in backends:
        seconds, memory = row["cold_start_seconds"], row["peak_bytes"]
        table.add_row(
            row["backend"],
            "failed" if seconds is None else f"{seconds:.1f}",
            "" if memory is None else f"{memory / 1e6:,.0f}",
            f"{row['jpg_images_per_second']:,.0f}",
        )
    return table


def draw(rows: list[Row], path: Path) -> None:
    """Draw images/s by batch size, a group of bars a batch."""
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
