"""`dcgan-eval fid`, `kid`, `is` and `precision-recall`: extract features, compare them, write the result."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UsageError
from pipeline.common.ranks import ALONE, Ranks, ranks_of
from pipeline.evaluation import charts, inputs
from pipeline.evaluation.device import background
from pipeline.evaluation.images import Images, ShardImages
from pipeline.evaluation.metrics.extractors import Extraction, Extractor, load_extractor
from pipeline.evaluation.metrics.feature_distances import (
    DENSITY_NEIGHBORS,
    IS_SPLITS,
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    NEIGHBORS,
    Moments,
    extrapolate,
    frechet_distance,
    inception_score,
    kernel_distance,
    overlap,
    require_enough,
)
from pipeline.evaluation.metrics.feature_extraction import (
    cached,
    extract_features,
    extract_moments,
    extract_nested_moments,
)
from pipeline.evaluation.metrics.protocols import published, why_not_comparable
from pipeline.evaluation.results import Result

NESTED_SETS = 5
"""Numbers of samples whose Fréchet distances show how it depends on their number."""


@dataclass(frozen=True)
class Request:
    """The options that the four commands share."""

    out: Path
    ckpt: str | None
    samples: str | None
    data: str | None
    count: int
    seed: int
    extractor: str
    extractor_sha256: str | None
    resize: int | None
    cache: Path | None


class Measurement:
    """One command's images, extractor and result, on every rank."""

    def __init__(self, name: str, request: Request, ranks: Ranks = ALONE) -> None:
        self.name = name
        self.request = request
        self.ranks = ranks
        self.extractor: Extractor = load_extractor(request.extractor, request.extractor_sha256, resize=request.resize)
        self.fakes, subject = inputs.fakes(request.ckpt, request.samples, request.count, request.seed)
        settings = {
            "images": self.fakes.count,
            "seed": request.seed,
            "extractor": self.extractor.name,
            "extractor_sha256": self.extractor.sha256,
            "resize": request.resize,
            "processes": self.ranks.world_size,
            **background(self.fakes.shape),
        }
        self.result = Result(name, request.out, subject, settings=settings)
        self.reals: ShardImages | None = None
        if request.data is not None:
            self.reals, self.result.data = inputs.reals(request.data, request.count, self.fakes.shape)
            inputs.check_same_shape(self.fakes, self.reals)
            settings["images_real"] = self.reals.count

    @property
    def main(self) -> bool:
        """Whether this rank writes the result."""
        return self.ranks.main

    def moments(self) -> tuple[Moments, list[Moments]]:
        """Return the moments of the real images (from the cache if they are there) and of growing sets of samples."""

        def make() -> dict[str, NDArray[Any]]:
            made = extract_moments(self._reals(), self.extractor, self.ranks, "features of real images")
            return {"total": made.total, "outer": made.outer}

        kept = cached(self._cache(), self._key("moments"), make)
        reals = Moments(kept["total"], kept["outer"], self._reals().count)
        what = "features of samples"
        return reals, extract_nested_moments(self.fakes, self.extractor, self.ranks, what, NESTED_SETS)

    def features(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the features of the real images (from the cache if they are there) and of the samples."""

        def make() -> dict[str, NDArray[Any]]:
            return {"features": self._extract(self._reals(), "features of real images").features}

        reals = cached(self._cache(), self._key("features"), make)["features"]
        return reals, self._extract(self.fakes, "features of samples").features

    def probabilities(self) -> NDArray[np.float32]:
        """Return class probabilities of the samples. Raises UsageError when the extractor has no classes."""
        require_enough(self.fakes.count)
        one = np.zeros((1, *self.fakes.shape), np.uint8)
        if self.extractor.extract(one).probabilities is None:  # refused before all samples are made
            raise UsageError(
                f"--extractor {self.request.extractor} has no classes, which an Inception score needs; name an "
                "Inception network, a network with logits, or a classifier.safetensors of `dcgan-eval classifier`"
            )
        found = self._extract(self.fakes, "classes of samples").probabilities
        assert found is not None
        return found

    def write(
        self,
        numbers: dict[str, float],
        summary: str,
        *,
        remarks: str = "",
        table: Sequence[list[Any]] = (),
        **details: int,
    ) -> dict[str, float]:
        """Write the JSON and a sheet of samples and real images, on the main rank.

        `details` are numbers that the metric's protocol states, such as its splits.
        """
        if self.main:
            rows = [("samples", _some(self.fakes))]
            if self.reals is not None:
                rows.append(("real images", _some(self.reals)))
            self.result.picture(charts.sheet(rows, 12), "Samples and, below, real images")
            obstacle = why_not_comparable(self.extractor.sha256, self.request.resize, self.fakes.count)
            network = published(self.extractor.sha256)
            self.result.protocol = {
                **inputs.preparations(self.result.subject, self.result.data),
                **self.extractor.protocol(),
                "images": self.fakes.count,
                "images_real": None if self.reals is None else self.reals.count,
                **details,
                "published": None if network is None else network.protocol,
                "comparable": not obstacle,
                "why_not": obstacle or None,
            }
            note = (
                f"Not comparable with published numbers: {obstacle}. Compare only with the same extractor, data set, "
                "resize and number of images."
                if obstacle
                else "Compare only with the same data set, crop and number of real images."
            )
            self.result.write(
                dict(numbers), summary=summary, note=" ".join(filter(None, [remarks, note])), table=list(table)
            )
        return numbers

    def _extract(self, images: Images, what: str) -> Extraction:
        return extract_features(images, self.extractor, self.ranks, what)

    def _reals(self) -> ShardImages:
        assert self.reals is not None
        return self.reals

    def _cache(self) -> Path | None:
        # Only one rank could write the cache, and the others would wait for it: several ranks keep nothing.
        return self.request.cache if self.ranks.world_size == 1 else None

    def _key(self, kind: str) -> dict[str, Any]:
        reals = self._reals()
        return {
            "kind": kind,
            "data": reals.dataset.fingerprint(),
            "images": reals.count,
            "extractor": self.extractor.sha256,
            "resize": self.request.resize,
        }


@contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """Yield the ranks that `accelerate launch` or `torchrun` started, or this process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    from accelerate import Accelerator

    accelerator = Accelerator()
    try:
        yield ranks_of(accelerator)
    finally:
        accelerator.end_training()


def measure(name: str, request: Request, ranks: Ranks = ALONE) -> dict[str, float]:
    """Run `fid`, `kid`, `is` or `precision-recall`, write its result, and return the numbers."""
    if name != "is" and request.data is None:
        raise UsageError("--data is missing: give the real images to compare with")
    measurement = Measurement(name, request, ranks)
    extractor = measurement.extractor.name
    if name == "fid":
        return _fid(measurement)
    if name == "kid":
        reals, fakes = measurement.features()
        mean, deviation = kernel_distance(reals, fakes, request.seed)
        summary = f"Kernel distance × 1000: {mean * 1e3:.3f} ± {deviation * 1e3:.3f} by {extractor}."
        numbers = {"kid_x1000": mean * 1e3, "deviation_x1000": deviation * 1e3}
        size = min(KID_SUBSET_SIZE, len(reals), len(fakes))
        return measurement.write(numbers, summary, subsets=KID_SUBSETS, subset_images=size)
    if name == "is":
        mean, deviation = inception_score(measurement.probabilities())
        summary = f"Inception score {mean:.3f} ± {deviation:.3f} by {extractor}."
        return measurement.write({"is": mean, "deviation": deviation}, summary, splits=IS_SPLITS)
    found = overlap(*measurement.features())
    summary = (
        f"{found.precision:.1%} of the samples lie among real images, {found.recall:.1%} of the real images among "
        f"samples; density {found.density:.3f}, coverage {found.coverage:.1%}. Features by {extractor}."
    )
    return measurement.write(asdict(found), summary, neighbors=NEIGHBORS, density_neighbors=DENSITY_NEIGHBORS)


def _fid(measurement: Measurement) -> dict[str, float]:
    """Write the Fréchet distance, and how it depends on the number of samples."""
    reals, samples = measurement.moments()
    counts = [moments.count for moments in samples]
    value, features, fewest = frechet_distance(reals, samples[-1]), len(reals.total), min(counts[-1], reals.count)
    numbers, remarks = {"fid": value}, ""
    table: list[list[Any]] = []
    summary = f"Fréchet distance {value:.3f} of {counts[-1]:,} samples"
    if counts[0] > features and len(counts) > 1:
        distances = [*(frechet_distance(reals, moments) for moments in samples[:-1]), value]
        numbers["fid_infinity"] = extrapolate(counts, distances)
        summary += f", {numbers['fid_infinity']:.3f} extrapolated to infinitely many"
        rows = ([count, round(distance, 3)] for count, distance in zip(counts, distances, strict=True))
        table = [["samples", "Fréchet distance"], *rows]
    elif fewest <= features:
        remarks = (
            f"Warning: {fewest:,} images cannot fill the covariance of {features:,} "
            "features: the distance is far too large, and says more of their number than of their quality."
        )
    return measurement.write(numbers, f"{summary}, by {measurement.extractor.name}.", remarks=remarks, table=table)


def _some(images: Images, number: int = 24) -> NDArray[np.uint8]:
    _, block = next(iter(images.blocks()))
    return block[:number]
