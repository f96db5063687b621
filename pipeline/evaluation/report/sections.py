"""The content of the report, section by section, from the files of a run; any of them may be missing."""

from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import ValidationError

from pipeline.common.errors import DataError
from pipeline.common.svg import short
from pipeline.config import RunConfig
from pipeline.evaluation.report.curves import Entries
from pipeline.evaluation.results import in_words
from pipeline.model.networks import build_discriminator, build_generator
from pipeline.model.sampling import GRID_CLASSES, GRID_COLUMNS

ANALYSES = {
    "progress": ("The same samples over training", ""),
    "walk": ("A walk through latent space", "As Figure 4 of the paper, moving"),
    "labels": ("The class that was wanted", "As a classifier of real images sees it"),
    "nearest-class": ("Real images by their nearest sample", "Table 3 of the paper"),
    "interpolate": ("Walks between samples", "Figure 4 of the paper"),
    "arithmetic": ("Arithmetic with faces", "Figure 7 of the paper"),
    "turn": ("Turning a head", "Figure 8 of the paper"),
    "features": ("What the discriminator looks at", "Figure 5 of the paper"),
    "forget": ("Forgetting an object", "Figure 6 of the paper"),
    "probe": ("What the features know", "Tables 1 and 2 of the paper"),
    "neighbors": ("Nearest training images", "Whether samples are copies"),
    "memorization": ("Learned or memorized", "Section 3 of the paper"),
    "classifier": ("The attribute classifier", "It scores the results above"),
}
"""Heading and relation to the paper, in the order of the page. Other results follow under their own names."""

QUALITY = {
    "swd": "Sliced Wasserstein distance × 1000",
    "ms_ssim": "MS-SSIM of random pairs",
    "fid": "Fréchet distance",
    "kid": "Kernel distance",
    "is": "Inception score",
    "precision-recall": "Precision and recall",
}


def run_config(content: dict[str, Any]) -> RunConfig | None:
    """Return the configuration in a config.json, or None if this version cannot read it."""
    try:
        return RunConfig.model_validate(content.get("config"))
    except ValidationError:
        return None


def data_name(content: dict[str, Any]) -> str:
    """Return the name of the data set: the last folder of its location."""
    location = str(content.get("dataset", {}).get("location", "")).rstrip("/")
    return location.rpartition("/")[2] or "an unknown data set"


def summary(content: dict[str, Any], metrics: Entries) -> str:
    """Return one sentence: the network, its data set, and the length of the training."""
    config = run_config(content)
    seen = max((entry["images"] for entry in metrics), default=0)
    total = content.get("dataset", {}).get("images")
    what = "A GAN"
    if config is not None:
        network = config.network
        kind = {1: "gray", 3: "color", 4: "color and transparency"}[network.channels]
        height, width, _ = network.image_shape
        name = "DCGAN" if network.architecture == "dcgan" else f"{network.architecture} GAN"
        what = f"A {name} for {kind} images of {width}×{height} pixels"
    trained = f", trained on {data_name(content)}" + (f" ({total:,} images)" if total else "")
    length = f" for {seen:,} images" + (f", {seen / total:.1f} passes over them" if total else "") if seen else ""
    return f"{what}{trained}{length}."


def grid_samples(content: dict[str, Any]) -> str:
    """Return what a grid of the run shows, such as `64 samples`."""
    config = run_config(content)
    if config is None or not config.network.label:
        return "64 samples"
    return f"{GRID_COLUMNS} samples of each of {min(len(config.network.classes), GRID_CLASSES)} classes, of the same z"


def facts(content: dict[str, Any], metrics: Entries, timing: Entries) -> list[tuple[str, str, str]]:
    """Return (value, meaning, detail) of the cards at the top."""
    found = []
    config = run_config(content)
    seen = max((entry["images"] for entry in metrics), default=None)
    if seen is not None:
        steps = f"{seen // config.recipe.batch:,} updates of {config.recipe.batch}" if config else ""
        found.append((short(seen), "images seen", steps))
    data = content.get("dataset", {})
    if data.get("images"):
        found.append((short(data["images"]), "images in the data set", data_name(content)))
    if config is not None:
        generator, discriminator = parameters(config)
        detail = f"D {short(discriminator)}; width {config.network.width}"
        found.append((short(generator), "parameters in the generator", detail))
    evaluated = [entry for entry in metrics if "swd" in entry]
    if evaluated:
        best = min(evaluated, key=lambda entry: float(entry["swd"]))
        found.append((f"{best['swd']:.1f}", "best SWD × 1000", f"after {best['images']:,} images"))
    rates = [float(entry["images_per_second"]) for entry in timing if entry.get("images_per_second")]
    if rates:
        found.append((f"{median(rates):,.0f}", "images a second", "median while training"))
    return found


def parameters(config: RunConfig) -> tuple[int, int]:
    """Return the number of parameters of G and D, without allocating them."""
    with torch.device("meta"):
        networks = build_generator(config.network), build_discriminator(config.network)
    generator, discriminator = (sum(p.numel() for p in network.parameters()) for network in networks)
    return generator, discriminator


def quality_table(metrics: Entries, results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a block for each metric: its title, columns, rows of (name, values), note, and settings."""
    blocks = []
    for name, title in QUALITY.items():
        if name not in results:
            continue
        result = results[name]
        rows = [("these samples", flat_numbers(result["results"]))]
        for extra, label in (
            ("samples_against_half", "samples against half"),
            ("real_against_real", "real against real"),
        ):
            if isinstance(result["results"].get(extra), dict):
                rows.append((label, flat_numbers(result["results"][extra])))
        rows += [
            (f"{entry['what']} ({entry['source']})", flat_numbers(entry["values"]))
            for entry in result.get("published", [])
        ]
        columns = [key for key in rows[0][1] if key != "real_against_real_images"]
        blocks.append(
            {
                "title": title,
                "columns": [key.replace("_", " ") for key in columns],
                "rows": [(label, [number(values.get(key)) for key in columns]) for label, values in rows],
                "note": result.get("note", ""),
                **measured(result),
            }
        )
    for earlier, later in reversed(list(pairwise(blocks))):
        if earlier["note"] == later["note"]:
            earlier["note"] = ""  # a shared note is shown once, below the last block
    evaluated = [entry for entry in metrics if "swd" in entry]
    if evaluated and "swd" not in results:
        last = evaluated[-1]
        columns = [key for key in last if key.startswith(("swd", "ms_ssim"))]
        blocks.append(
            {
                "title": "Measured while training",
                "columns": [key.replace("_", " ") for key in columns],
                "rows": [(f"after {last['images']:,} images", [number(last[key]) for key in columns])],
                "note": "These use fewer patches and images than published numbers: compare them within this run only.",
                "measured": "",
                "protocol": "",
            }
        )
    return blocks


def measured(result: dict[str, Any]) -> dict[str, str]:
    """Return a result's protocol in words, and its settings that are not in it."""
    protocol = result.get("protocol", {})
    settings = {k: v for k, v in result.get("settings", {}).items() if k not in protocol and (k, v) != ("processes", 1)}
    return {"protocol": in_words(protocol), "measured": in_words(settings)}


def flat_numbers(values: dict[str, Any]) -> dict[str, float]:
    """Return the entries that are numbers."""
    return {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def number(value: Any) -> str:
    """Write a value for a table."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def analyses(results: dict[str, dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Return heading, summary, pictures and table of every result that is not in QUALITY."""
    order = [name for name in ANALYSES if name in results]
    order += [name for name in results if name not in ANALYSES and name not in QUALITY]
    found = []
    for name in order:
        result = results[name]
        title, relation = ANALYSES.get(name, (name.capitalize(), ""))
        pictures = []
        for entry in result["pictures"]:
            path = folder / str(entry["file"])
            if not path.resolve().is_relative_to(folder.resolve()):
                raise DataError(f"{folder / name}.json: names a picture outside its folder: {entry['file']!r}")
            if path.is_file():
                pictures.append((path, entry.get("caption", "")))
        table = result.get("table")
        found.append(
            {
                "name": name,
                "title": title,
                "relation": relation,
                "summary": result.get("summary", ""),
                "note": result.get("note", ""),
                **measured(result),
                "published": [
                    (f"{entry['what']} ({entry['source']})", in_words(entry["values"]))
                    for entry in result.get("published", [])
                ],
                "pictures": pictures,
                "table": table if isinstance(table, list) and len(table) > 1 else [],
            }
        )
    return found


def bench_table(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a throughput table from the JSON of a benchmark, whose rows are objects with the same keys."""
    rows = content.get("rows") or content.get("results") or []
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    columns = [key for key in (rows[0] if rows else {}) if not isinstance(rows[0][key], dict | list)]
    hardware = content.get("hardware") or content.get("machine") or ""
    if isinstance(hardware, dict):
        hardware = ", ".join(f"{value}" for value in hardware.values())
    return {
        "title": str(content.get("title") or name.replace("_", " ")),
        "hardware": str(hardware),
        "columns": [key.replace("_", " ") for key in columns],
        "rows": [[number(row.get(key)) for key in columns] for row in rows],
    }


def settings(content: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the configuration and the data set, each as (group, [(key, value)])."""
    groups = []
    for section, values in content.get("config", {}).items():
        if isinstance(values, dict):
            groups.append((section, [(key, str(value)) for key, value in values.items()]))
    data = content.get("dataset", {})
    if data:
        groups.append(("data set", [(key, str(value)) for key, value in data.items()]))
    return groups
