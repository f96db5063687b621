"""Fréchet and kernel distances agree with independent computations, behave, and add up over processes."""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import numpy as np
import onnx
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.stats
import torch
import warm_start
from numpy.typing import NDArray
from planted import planted
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from pipeline.common.errors import DataError, UnavailableError, UsageError
from pipeline.common.ranks import ALONE
from pipeline.evaluation.images import ArrayImages
from pipeline.evaluation.metrics.extractors import FALLBACK, FallbackExtractor, load_extractor
from pipeline.evaluation.metrics.feature_distances import (
    Moments,
    extrapolate,
    frechet_distance,
    inception_score,
    kernel_distance,
    overlap,
)
from pipeline.evaluation.metrics.feature_extraction import extract_moments
from pipeline.evaluation.metrics.feature_metrics import Request, measure
from pipeline.evaluation.metrics.protocols import NETWORKS, why_not_comparable

Rows = NDArray[np.float32]


@pytest.fixture(scope="module")
def features() -> tuple[Rows, Rows]:
    draw = np.random.default_rng(0)
    mix = draw.normal(size=(24, 24))
    a = draw.normal(size=(400, 24)) @ mix
    b = draw.normal(size=(300, 24)) @ (mix + 0.2 * draw.normal(size=(24, 24))) + 0.3
    return a.astype(np.float32), b.astype(np.float32)


class Identity(nn.Module):
    num_features = 24

    def forward(self, rows: Tensor) -> Tensor:
        return rows


def test_the_frechet_distance_agrees_with_scipy_and_torchmetrics(features: tuple[Rows, Rows]) -> None:
    a, b = features
    ours = frechet_distance(Moments.of(a), Moments.of(b))
    covariances = np.cov(a.astype(np.float64).T), np.cov(b.astype(np.float64).T)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    means = a.astype(np.float64).mean(0) - b.astype(np.float64).mean(0)
    expected = means @ means + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert ours == pytest.approx(expected, rel=1e-8)
    metric = FrechetInceptionDistance(Identity()).set_dtype(torch.float64)
    metric.update(torch.from_numpy(a), real=True)
    metric.update(torch.from_numpy(b), real=False)
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)


def test_singular_covariances_are_no_problem() -> None:
    rows = np.random.default_rng(0).normal(size=(10, 24)).astype(np.float32)  # rank 9 of 24
    assert frechet_distance(Moments.of(rows), Moments.of(rows)) == pytest.approx(0, abs=1e-5)
    shifted = frechet_distance(Moments.of(rows), Moments.of(rows + 1))
    assert shifted == pytest.approx(24, rel=1e-5)


def test_the_kernel_distance_agrees_with_the_formula(features: tuple[Rows, Rows]) -> None:
    a, b = features[0][:300], features[1]
    mean, _ = kernel_distance(a, b, seed=0)

    def kernel(x: Rows, y: Rows) -> NDArray[np.float64]:
        return np.asarray((x.astype(np.float64) @ y.T.astype(np.float64) / x.shape[1] + 1) ** 3)

    m = 300  # every subset is the whole set, so chance has no part in it
    within = [(k.sum() - np.trace(k)) / (m * (m - 1)) for k in (kernel(a, a), kernel(b, b))]
    assert mean == pytest.approx(sum(within) - 2 * kernel(a, b).mean(), rel=1e-3)


def test_the_inception_score_is_one_for_doubt_and_the_number_of_classes_for_certainty() -> None:
    doubt = np.full((200, 4), 0.25, np.float32)
    assert inception_score(doubt) == pytest.approx((1, 0), abs=1e-6)
    certain = np.eye(4, dtype=np.float32)[np.arange(400) % 4]
    assert inception_score(certain) == pytest.approx((4, 0), abs=1e-6)


def test_the_inception_score_is_the_formula_over_all_images() -> None:
    rows = np.random.default_rng(0).dirichlet(np.full(5, 0.3), 207)
    scores, start = [], 0
    for split in range(10):
        part = rows[start : start + (21 if split < 7 else 20)].astype(np.float32).astype(np.float64)
        start += len(part)
        scores.append(np.exp(np.mean([scipy.stats.entropy(row, part.mean(0)) for row in part])))
    assert start == 207
    mean = sum(scores) / 10
    deviation = (sum((score - mean) ** 2 for score in scores) / 10) ** 0.5
    assert inception_score(rows.astype(np.float32)) == pytest.approx((mean, deviation), rel=1e-6)
    with pytest.raises(UsageError, match="of 99 images says nothing: expected at least 100"):
        inception_score(rows[:99].astype(np.float32))


def test_precision_and_recall_tell_fidelity_from_coverage() -> None:
    draw = np.random.default_rng(0)
    wide = draw.normal(size=(400, 4)).astype(np.float32)
    narrow = (0.2 * draw.normal(size=(400, 4))).astype(np.float32)
    found = overlap(wide, narrow)
    assert found.precision > 0.95
    assert found.recall < 0.5
    assert found.density > 1
    assert found.coverage < 0.7
    apart = overlap(wide, wide + 100)
    assert (apart.precision, apart.recall, apart.density, apart.coverage) == (0, 0, 0, 0)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_overlap_is_the_formula_even_for_features_far_from_zero(offset: float) -> None:
    draw = np.random.default_rng(1)
    reals = (draw.normal(size=(150, 6)) + offset).astype(np.float32)
    fakes = (0.7 * draw.normal(size=(170, 6)) + 0.4 + offset).astype(np.float32)

    def distances(a: Rows, b: Rows) -> Rows:
        return np.asarray(np.linalg.norm(a[:, None].astype(np.float64) - b[None].astype(np.float64), axis=2))

    def radii(rows: Rows, k: int) -> Rows:
        return np.asarray(np.sort(distances(rows, rows), 1)[:, k])

    between = distances(fakes, reals)
    expected = {
        "precision": (between <= radii(reals, 3)).any(1).mean(),
        "recall": (distances(reals, fakes) <= radii(fakes, 3)).any(1).mean(),
        "density": (between <= radii(reals, 5)).sum() / (5 * len(fakes)),
        "coverage": (between <= radii(reals, 5)).any(0).mean(),
    }
    assert asdict(overlap(reals, fakes)) == pytest.approx(expected, abs=1e-9)


def test_the_distance_of_infinitely_many_samples_is_that_of_the_distributions() -> None:
    draw = np.random.default_rng(2)
    reals = Moments.of(draw.normal(size=(100_000, 16)).astype(np.float32))
    samples = draw.normal(size=(4_000, 16)).astype(np.float32)
    nested = [Moments.of(samples[: 800 * number]) for number in range(1, 6)]
    distances = [frechet_distance(reals, moments) for moments in nested]
    assert distances[-1] > 0.015
    assert abs(extrapolate([moments.count for moments in nested], distances)) < distances[-1] / 3


def test_distances_order_a_split_a_blur_noise_and_another_set() -> None:
    images, _ = planted(512, seed=4)
    real, other = images[:256], images[256:]
    blurred = scipy.ndimage.gaussian_filter(other, (0, 2.0, 2.0, 0))
    noisy = np.clip(other + np.random.default_rng(0).normal(0, 40, other.shape), 0, 255).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, other.shape, dtype=np.uint8)
    extractor = FallbackExtractor()
    reference = extract_moments(ArrayImages(real), extractor, ALONE, "real")
    split, soft, rough, else_ = (
        frechet_distance(reference, extract_moments(ArrayImages(x), extractor, ALONE, "other"))
        for x in (other, blurred, noisy, noise)
    )
    assert split * 2 < soft < rough < else_


class InceptionLike(nn.Module):
    """The calling convention of the StyleGAN line's Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        features = img.float().mean((2, 3)) @ self.weight
        if return_features:
            return features
        return torch.softmax(features if no_output_bias else features + 1, 1)


def test_a_torchscript_inception_is_called_as_it_expects(tmp_path: Path) -> None:
    path = tmp_path / "inception-2015-12-05.pt"
    module = InceptionLike()
    torch.jit.script(module).save(path)  # type: ignore[no-untyped-call]
    images, _ = planted(4, seed=0)
    extractor = load_extractor(str(path))
    extracted = extractor.extract(images)
    means = torch.from_numpy(images.astype(np.float32).mean((1, 2)))
    np.testing.assert_allclose(extracted.features, (means @ module.weight).detach(), rtol=1e-4)
    assert extracted.probabilities is not None
    np.testing.assert_allclose(extracted.probabilities.sum(1), 1, rtol=1e-5)
    assert extractor.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    gray = load_extractor(str(path), resize=8).extract(images[..., :1])
    assert gray.features.shape == (4, 5)


def test_an_onnx_extractor_gives_features_and_classes(tmp_path: Path) -> None:
    nodes = [
        onnx.helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        onnx.helper.make_node("Flatten", ["pooled"], ["features"]),
        onnx.helper.make_node("Neg", ["features"], ["logits"]),
    ]
    shapes: dict[str, list[int | str]] = {"images": ["n", 3, "h", "w"], "features": ["n", 3], "logits": ["n", 3]}
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:])
    path = tmp_path / "small.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)
    images, _ = planted(4, seed=0)
    extracted = load_extractor(str(path)).extract(images)
    np.testing.assert_allclose(extracted.features, images.astype(np.float32).mean((1, 2)), rtol=1e-4)
    assert extracted.probabilities is not None


def test_extractors_are_what_they_are_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a URL needs --extractor-sha256"):
        load_extractor("https://example.org/inception.pt")
    file = tmp_path / "x.pt"
    file.write_bytes(b"no module")
    for name in (str(file), "fallback", "inception"):
        with pytest.raises(DataError, match="another file"):
            load_extractor(name, "0" * 64)
    with pytest.raises(DataError, match="not a TorchScript module"):
        load_extractor(str(file))
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(DataError, match="ONNX Runtime cannot load it"):
        load_extractor(str(tmp_path / "x.onnx"))
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"expected fallback, inception, or a \.pt"):
        load_extractor(str(tmp_path / "x.bin"))
    assert "never compare" in load_extractor(FALLBACK).name


def test_a_published_network_is_known_by_its_content_alone() -> None:
    (network,) = NETWORKS.values()
    assert why_not_comparable(network.sha256, None, 50_000) == ""
    assert "not the network of published numbers" in why_not_comparable("0" * 64, None, 50_000)
    assert "resized to 75 pixels" in why_not_comparable(network.sha256, 75, 50_000)
    assert "10,000 samples, where published numbers have 50,000" in why_not_comparable(network.sha256, None, 10_000)


def test_a_network_by_name_is_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.jit.script(InceptionLike()).save(tmp_path / "module.pt")  # type: ignore[no-untyped-call]
    content = (tmp_path / "module.pt").read_bytes()
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/networks/module.pt", content)
    (known,) = NETWORKS.values()
    there = replace(known, url="memory://networks/module.pt", sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(NETWORKS, "inception", there)
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path / "cache"))
    assert load_extractor("inception").sha256 == there.sha256
    memory.pipe_file("/networks/module.pt", b"another")
    assert load_extractor("inception").sha256 == there.sha256  # from the cache
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UnavailableError, match=rf"another file came back.*--extractor-sha256 {there.sha256}"):
        load_extractor("inception")
    memory.rm("/networks/module.pt")
    with pytest.raises(UnavailableError, match="no such file"):
        load_extractor("inception")
    assert not (tmp_path / "cache").exists()


def test_a_network_for_which_the_disk_has_no_room_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.jit.script(InceptionLike()).save(tmp_path / "module.pt")  # type: ignore[no-untyped-call]
    content = (tmp_path / "module.pt").read_bytes()
    fsspec.filesystem("memory").pipe_file("/networks/large.pt", content)
    (known,) = NETWORKS.values()
    digest = hashlib.sha256(content).hexdigest()
    there = replace(known, url="memory://networks/large.pt", sha256=digest, megabytes=1 << 40)
    monkeypatch.setitem(NETWORKS, "inception", there)
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path / "cache"))
    assert load_extractor("inception").sha256 == digest
    assert not (tmp_path / "cache").exists()


def request(out: Path, run: Path, data: Path | None, **changes: object) -> Request:
    options = {
        "out": out,
        "ckpt": str(run),
        "samples": None,
        "data": str(data) if data else None,
        "count": 300,
        "seed": 0,
        "extractor": FALLBACK,
        "extractor_sha256": None,
        "resize": None,
        "cache": None,
    }
    return Request(**(options | changes))  # type: ignore[arg-type]


def test_every_metric_writes_what_it_measured_and_with_what(
    run: Path, labeled: Path, classifier_file: Path, tmp_path: Path
) -> None:
    for name, extractor in (
        ("fid", FALLBACK),
        ("kid", FALLBACK),
        ("precision-recall", FALLBACK),
        ("is", classifier_file),
    ):
        numbers = measure(name, request(tmp_path, run, labeled, extractor=str(extractor)))
        written = json.loads((tmp_path / f"{name}.json").read_text())
        assert written["results"] == numbers
        assert written["settings"]["images"] == 300
        assert len(written["settings"]["extractor_sha256"]) == 64
        assert "Not comparable with published numbers" in written["note"]
        protocol = written["protocol"]
        assert (protocol["images"], protocol["comparable"], protocol["published"]) == (300, False, None)
    with pytest.raises(UsageError, match="has no classes"):
        measure("is", request(tmp_path, run, labeled))
    with pytest.raises(UsageError, match="--data is missing"):
        measure("fid", request(tmp_path, run, None))


def test_samples_that_an_engine_wrote_are_scored_as_shards(run: Path, labeled: Path, tmp_path: Path) -> None:
    same = measure("fid", request(tmp_path, run, labeled, ckpt=None, samples=str(labeled)))
    assert same["fid"] == pytest.approx(0, abs=1e-4)


def test_reference_statistics_are_kept_and_never_serve_another_question(
    run: Path, labeled: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = measure("fid", request(tmp_path, run, labeled, cache=cache))
    (kept,) = cache.iterdir()
    stamp = kept.stat().st_mtime_ns
    assert measure("fid", request(tmp_path, run, labeled, cache=cache)) == first
    assert kept.stat().st_mtime_ns == stamp
    measure("fid", request(tmp_path, run, labeled, cache=cache, resize=16))
    measure("fid", request(tmp_path, run, labeled, cache=cache, count=200))
    assert len(list(cache.iterdir())) == 3
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(DataError, match="damaged"):
        measure("fid", request(tmp_path, run, labeled, cache=cache))


def test_two_processes_give_the_same_distance_as_one(run: Path, labeled: Path, tmp_path: Path) -> None:
    alone = measure("fid", request(tmp_path / "one", run, labeled))
    command = [sys.executable, "-m", "pipeline.evaluation.cli", "fid", "--ckpt", str(run), "--data", str(labeled),
               "--count", "300", "--out", str(tmp_path / "two")]  # fmt: skip
    warm_start.run_ranks(command, 2, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    written = json.loads((tmp_path / "two" / "fid.json").read_text())
    assert written["settings"]["processes"] == 2
    assert written["results"]["fid"] == pytest.approx(alone["fid"], rel=1e-9)


def test_an_extractor_for_another_size_says_so(tmp_path: Path) -> None:
    """In one line, and before hours of sampling end in a traceback."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Flatten", ["images"], ["features"])],
        "g",
        [value("images", onnx.TensorProto.FLOAT, ["n", 3, 299, 299])],
        [value("features", onnx.TensorProto.FLOAT, ["n", 3 * 299 * 299])],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "large.onnx")

    class Fixed(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.reshape(-1, 3 * 299 * 299)

    torch.jit.script(Fixed()).save(str(tmp_path / "large.pt"))  # type: ignore[no-untyped-call]
    for name in ("large.onnx", "large.pt"):
        extractor = load_extractor(str(tmp_path / name))
        with pytest.raises(DataError, match=r"cannot take images of shape \(3, 32, 32\).*--resize"):
            extractor.extract(np.zeros((2, 32, 32, 3), np.uint8))
        resized = load_extractor(str(tmp_path / name), resize=299)
        assert resized.extract(np.zeros((2, 32, 32, 3), np.uint8)).features.shape == (2, 3 * 299 * 299)
