"""Whether the sampler waits for encoding and writing, and what 100,000 images a second would need.

    python benchmarks/generate.py [--rounds 15]

A null sampler returns images that were made before, so encoding and writing alone limit generation: its rate is
compared with the rates of encoding alone and of writing alone. The rate with the real sampler is compared with the
sampler alone. All arms take turns; results are medians of the rounds' ratios. "again" is the A/A control.
"""

import argparse
import json
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from hardware import describe
from numpy.typing import NDArray

from deploy.generation.manifest import Provenance, finish_shard
from deploy.generation.pipeline import PIECE_IMAGES, WRITERS, block_rows, generate_shards
from deploy.generation.plan import Plan, ShardRange
from export.samplers.base import Sampler
from export.samplers.open import open_sampler
from pipeline.common.imaging import Format, Pixels, encode
from pipeline.common.storage import Store, write_atomic
from pipeline.data.dataset import Encoding, open_dataset
from pipeline.data.shard_reader import iterate
from pipeline.data.shard_writer import Pieces, ShardWriter

BLOCK, ENCODERS, QUALITY = 64, 2, 90
BULK: dict[Encoding, int] = {"packed": 16384, "jpg": 65536, "webp": 4096}
"""Images of a turn with the null sampler: enough that the start of the encoders does not count."""
FEW = 8192
"""The same with the real sampler, which is much slower."""
SHARD_IMAGES = 1024
"""Half of dcgan-generate's default for packed, so that a turn has several."""
PROVENANCE = Provenance(device="cpu", provider="benchmark", versions={})
TARGETS = {
    "packed, null sampler / ceiling": 0.8,
    "jpg, null sampler / ceiling": 0.8,
    "webp, null sampler / ceiling": 0.8,
    "packed, real sampler / sampler alone": 0.95,
    "jpg, real sampler / sampler alone": 0.95,
}


class NullSampler:
    """Returns images that exist already, as a fast GPU would."""

    device = "none"

    def __init__(self, images: Pixels, count: int) -> None:
        self._images, self._count = images, count

    def stream(self, blocks: Iterator[NDArray[np.float32]]) -> Iterator[Pixels]:
        """Yield `count` images, BLOCK at a time; computing z is a sampler's work, so none is asked for."""
        for first in range(0, self._count, BLOCK):
            yield self._images[first % len(self._images) :][:BLOCK]


def main() -> None:
    """Measure, compare with the targets, and write benchmarks/results/generate.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--work", type=Path, default=Path("/tmp/dcgan-benchmark-generate"))
    options = parser.parse_args()
    images = np.concatenate(list(iterate(open_dataset("data/faces"))))[:4096]
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    with open_sampler(str(write_model(options.work)), batch=BLOCK) as sampler:
        plans = {
            (encoding, count): make_plan(sampler, encoding, count)
            for encoding, bulk in BULK.items()
            for count in (bulk, FEW)
        }

        def generate(source: NullSampler | Sampler, encoding: Encoding, count: int) -> float:
            return seconds_to_generate(source, plans[encoding, count], options.work / "out")

        arms: dict[str, tuple[int, Callable[[], float]]] = {
            "sampler alone": (FEW, lambda: sample_only(sampler, plans["jpg", FEW]))
        }
        for encoding, count in BULK.items():
            null = partial(generate, NullSampler(images, count), encoding, count)
            arms |= {
                f"{encoding}, raw write": (
                    count,
                    partial(write_only, make_shard(images, encoding), options.work / "raw", count),
                ),
                f"{encoding}, null sampler": (count, null),
                f"{encoding}, null sampler again": (count, null),
            }
            if f"{encoding}, real sampler / sampler alone" in TARGETS:
                arms[f"{encoding}, real sampler"] = (FEW, partial(generate, sampler, encoding, FEW))
            if encoding != "packed":
                bulk = np.concatenate([images] * (count // len(images)))
                arms[f"{encoding}, encode"] = (count, partial(encode_only, bulk, encoding))
        rates = race(arms, options.rounds)
    report(rates, cpu_work(images), sampler)
    shutil.rmtree(options.work)


def race(arms: dict[str, tuple[int, Callable[[], float]]], rounds: int) -> dict[str, list[float]]:
    """Return images a second by arm and round; the order turns by one arm each round. One round more warms up."""
    names = list(arms)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            images, run = arms[name]
            rate = images / run()
            if number:
                rates[name].append(rate)
        print(f"round {number} of {rounds}", flush=True)
    return rates


def seconds_to_generate(source: NullSampler | Sampler, plan: Plan, out: Path) -> float:
    """Generate into an empty folder, to disk and synced, as dcgan-generate does."""
    shutil.rmtree(out, ignore_errors=True)
    store = Store(out)

    def finish(shard: ShardRange, writer: ShardWriter) -> None:
        finish_shard(store, plan, shard, writer, PROVENANCE)

    began = time.perf_counter()
    generate_shards(
        source,
        plan,
        plan.shards(),
        finish,
        encoders=ENCODERS,
        stop=threading.Event(),
    )
    return time.perf_counter() - began


def write_only(shard: bytes, out: Path, count: int) -> float:
    """Write `count` images' shards to disk, synced, from as many threads, and nothing else."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda n: write_atomic(out / f"{n}.tar", shard), range(count // SHARD_IMAGES)))
    return time.perf_counter() - began


def encode_only(images: Pixels, encoding: Format) -> float:
    """Encode, and nothing else, on as many threads."""
    began = time.perf_counter()
    pieces = [images[start : start + PIECE_IMAGES] for start in range(0, len(images), PIECE_IMAGES)]
    with ThreadPoolExecutor(ENCODERS) as pool:
        list(pool.map(lambda piece: [encode(image, encoding, QUALITY) for image in piece], pieces))
    return time.perf_counter() - began


def sample_only(sampler: Sampler, plan: Plan) -> float:
    """Sample, with the latents, and nothing else."""
    began = time.perf_counter()
    for _ in sampler.stream(block_rows(plan, first) for first in range(0, plan.count, BLOCK)):
        pass
    return time.perf_counter() - began


def make_shard(images: Pixels, encoding: Encoding) -> bytes:
    """Return a shard's bytes."""
    images = images[:SHARD_IMAGES]
    contents = images if encoding == "packed" else [encode(image, encoding, QUALITY) for image in images]
    return b"".join(tar(contents, encoding))


def tar(contents: Pixels | list[bytes], encoding: Encoding) -> Pieces:
    """Return a shard's bytes in pieces."""
    writer, keys = (
        ShardWriter("000000000000", encoding, [], limit_bytes=None),
        [f"{i:012d}" for i in range(len(contents))],
    )
    writer.add_all(contents, keys)
    return writer.finish("x.tar")[0]


def make_plan(sampler: Sampler, encoding: Encoding, count: int) -> Plan:
    """Return a generation of `count` images."""
    return Plan(
        model_sha256="0" * 64,
        backend="benchmark",
        block_images=BLOCK,
        seed=0,
        start=0,
        count=count,
        latent_dim=sampler.latent_dim,
        latent_distribution=sampler.latent_distribution,
        image_size=64,
        channels=3,
        format=encoding,
        quality=None if encoding == "packed" else QUALITY,
        shard_images=SHARD_IMAGES,
    )


def write_model(folder: Path) -> Path:
    """Write the tutorials' generator (width 64), untrained: its speed does not depend on its weights."""
    from pipeline.checkpoints.weights import serialize
    from pipeline.config import NetworkConfig
    from pipeline.model.networks import build_generator, initialize

    config = NetworkConfig(width=64)
    generator = build_generator(config)
    initialize(generator, 0, lane=0)
    path = folder / "generator.safetensors"
    path.write_bytes(serialize(generator, config, "ema", 0))
    return path


def cpu_work(images: Pixels) -> dict[str, dict[str, float]]:
    """Return bytes and seconds of one core that an image takes; the least of many tries, without waiting times."""

    def least(run: Callable[[], object]) -> float:
        times = []
        for _ in range(15):
            began = time.thread_time()
            run()
            times.append(time.thread_time() - began)
        return min(times) / SHARD_IMAGES

    images = images[:SHARD_IMAGES]
    found: dict[str, dict[str, float]] = {}
    for encoding in BULK:
        made = partial(lambda encoding: [encode(image, encoding, QUALITY) for image in images], encoding)
        contents = images if encoding == "packed" else made()
        found[encoding] = {
            "bytes": len(make_shard(images, encoding)) / SHARD_IMAGES,
            "encode_seconds": 0.0 if encoding == "packed" else least(made),
            "tar_seconds": least(partial(tar, contents, encoding)),
        }
    return found


def report(rates: dict[str, list[float]], work: dict[str, dict[str, float]], sampler: Sampler) -> None:
    """Compare the rates with the targets and write the results."""
    median = {name: statistics.median(values) for name, values in rates.items()}

    def ratio(one: str, others: list[str]) -> float:
        rounds = zip(rates[one], *(rates[other] for other in others), strict=True)
        return statistics.median(first / min(rest) for first, *rest in rounds)

    ratios, control = {}, {}
    for name in BULK:
        ceilings = [f"{name}, raw write"] + [f"{name}, encode"] * (name != "packed")
        ratios[f"{name}, null sampler / ceiling"] = ratio(f"{name}, null sampler", ceilings)
        if f"{name}, real sampler" in rates:
            ratios[f"{name}, real sampler / sampler alone"] = ratio(f"{name}, real sampler", ["sampler alone"])
        again = ratio(f"{name}, null sampler again", [f"{name}, null sampler"])
        control[f"{name}, null sampler again / null sampler"] = again
    needs = {
        encoding: {
            "gigabytes_a_second": round(1e5 * work[encoding]["bytes"] / 1e9, 2),
            "encoder_cores": round(1e5 * work[encoding]["encode_seconds"], 1),
            "tar_and_hash_cores": round(1e5 * work[encoding]["tar_seconds"], 1),
        }
        for encoding in BULK
    }
    result = {
        **describe("onnxruntime", "openvino", "simplejpeg"),
        "sampler": f"{sampler.backend}, width 64, 64 pixels, batch {BLOCK}",
        "images_a_second": {name: round(value) for name, value in median.items()},
        "ratios": {
            name: {"value": round(value, 3), "bar": TARGETS[name], "met": value >= TARGETS[name]}
            for name, value in ratios.items()
        },
        "control": {name: round(value, 3) for name, value in control.items()},
        "for_100000_images_a_second": needs,
        "rounds": len(rates["sampler alone"]),
    }
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "generate.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = ["# Generation: does the sampler wait?", "", "| arm | images/s |", "|---|---|"]
    lines += [f"| {name} | {value:,.0f} |" for name, value in median.items()]
    lines += ["", "| ratio, median of rounds | value | target |", "|---|---|---|"]
    lines += [f"| {name} | {value:.2f} | {TARGETS[name]} |" for name, value in ratios.items()]
    lines += [f"| {name} (control) | {value:.2f} | |" for name, value in control.items()]
    lines += [
        "",
        "What 100,000 images a second need, by the CPU time of each image:",
        "",
        "| | GB/s | cores that encode | cores that make tars and hash |",
    ]
    lines += ["|---|---|---|---|"]
    lines += [
        f"| {encoding} | {need['gigabytes_a_second']} | {need['encoder_cores']} | {need['tar_and_hash_cores']} |"
        for encoding, need in needs.items()
    ]
    hardware = result["hardware"]
    lines += ["", f"{hardware['cpu']}, {hardware['cores']} cores; {result['date']}; `{result['command']}`."]
    (folder / "generate.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
