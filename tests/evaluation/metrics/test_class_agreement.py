"""dcgan-eval labels: pictures that show their label are found, others are not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluation_cases import Outcome
from planted import planted

from pipeline.checkpoints.weights import serialize
from pipeline.common.storage import Store
from pipeline.config import NetworkConfig
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.labeled import load_labeled
from pipeline.data.shard_writer import ShardWriter, write_shard
from pipeline.evaluation.metrics import labels
from pipeline.evaluation.metrics.extractors import load_extractor
from pipeline.evaluation.metrics.feature_distances import Moments, frechet_distance
from pipeline.evaluation.metrics.swd import Sampling
from pipeline.model.networks import build_generator, initialize

Evaluate = Callable[..., Outcome]


def generation(folder: Path) -> Path:
    """Write pictures as dcgan-generate does: those named discs are discs, those named squares only in part."""
    images, columns = planted(200, 7)
    kinds = [str(kind) if index % 2 else "square" for index, kind in enumerate(columns["kind"])]
    writer = ShardWriter("000000000000", "packed", ["kind"])
    writer.add_all(images, [f"{index:012d}" for index in range(200)], [(kind,) for kind in kinds])
    store = Store(folder)
    shard = write_shard(store, "samples.tar", writer)
    dataset = Dataset(
        image_size=32,
        channels=3,
        encoding="packed",
        labels={"kind": "str"},
        source={"kind": "generated", "labels": {"label": ["kind"], "draw": "balanced"}},
        images=200,
        bytes=shard.bytes,
        shards=[shard],
    )
    store.write("dataset.json", dataset.model_dump_json().encode())
    return folder


def conditional(path: Path, **label: object) -> Path:
    """Write an untrained conditional generator."""
    config = NetworkConfig.model_validate({"image_size": 32, "width": 4, "latent_dim": 6, **label})
    generator = build_generator(config)
    initialize(generator, 0, lane=0)
    path.write_bytes(serialize(generator.eval(), config, "ema", 0))
    return path


def test_samples_that_show_their_label_are_told_from_those_that_do_not(
    evaluate: Evaluate, labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels, "Sampling", lambda seed: Sampling(seed, patches=16, directions=16))
    options = ["--samples", generation(tmp_path / "samples"), "--data", labeled, "--extractor", "fallback"]
    done = evaluate("labels", *options, "--out", tmp_path)
    assert done.code == 0, done.err
    written = json.loads((tmp_path / "labels.json").read_text())
    results = written["results"]
    disc, square = results["by_class"]["disc"], results["by_class"]["square"]
    assert disc["agreement"] > 0.9
    assert 0.5 < square["agreement"] < 0.85
    assert results["agreement"] == pytest.approx((disc["agreement"] + square["agreement"]) / 2)
    assert results["agreement, real images"] > 0.9, "it is trained on real images alone"
    assert disc["interval"][0] < disc["agreement"] <= disc["interval"][1]
    swd = results["swd_by_class"]["disc"]
    assert 0.5 < swd["swd"] / swd["real_against_real"] < 2, "they are of one distribution"
    assert swd["images"] == disc["samples"] > 32
    fid = results["fid_by_class"]
    assert fid["disc"]["images"] == swd["images"]
    reals, fakes = (load_labeled(open_dataset(path)) for path in (labeled, tmp_path / "samples"))
    discs, made = (each.images[each.columns["kind"] == "disc"] for each in (reals, fakes))
    network = load_extractor("fallback")
    moments = [Moments.of(network.extract(images[: swd["images"]]).features) for images in (discs[::2], made)]
    assert fid["disc"]["fid"] == pytest.approx(frechet_distance(*moments), rel=1e-4)
    assert written["settings"]["extractor"].startswith("dcgan-fallback-v1")
    assert [row[0] for row in written["table"]] == ["class", "disc", "square"]
    assert written["table"][0][4:] == ["SWD", "of real images", "FID", "of real images", "images"]


def test_a_conditional_checkpoint_of_several_labels(evaluate: Evaluate, labeled: Path, tmp_path: Path) -> None:
    classes = {"label": ["bright", "disc"], "classes": ["00", "01", "10", "11"], "class_images": [1, 1, 1, 1]}
    ckpt = conditional(tmp_path / "g.safetensors", **classes)
    done = evaluate("labels", "--ckpt", ckpt, "--data", labeled, "--out", tmp_path, "--epochs", 12, "--count", 20)
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "labels.json").read_text())["results"]
    assert "fid_by_class" not in results, "no extractor was named"
    assert {*results["by_class"]} == {"none", "bright", "disc", "bright+disc"}
    assert results["bright, real images"] > 0.9
    assert results["agreement"] < 0.5 < results["agreement, real images"], "it has learned nothing yet"
    assert results["agreement"] <= min(results["bright"], results["disc"])
    assert (tmp_path / "labels_by_class.png").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--samples {data}", 2, "name what they were made to show: --label NAME"),
        ("--samples {data} --label hat", 2, "--label hat: "),
        ("--ckpt {plain}", 2, "is not conditioned on a label, so no class can be wanted"),
        ("--ckpt {ckpt} --label disc", 2, "is conditioned on kind"),
        ("--ckpt {ckpt} --resize 64", 2, "--resize are of an --extractor, and none is named"),
        ("--ckpt {ckpt} --samples {data}", 2, "and not both"),
        ("--ckpt {ckpt}", 65, "has no images of class ring (and of 0 others)"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    evaluate: Evaluate, labeled: Path, tmp_path: Path, options: str, code: int, message: str
) -> None:
    ckpt = conditional(tmp_path / "g.safetensors", label=["kind"], classes=["disc", "ring"], class_images=[1, 1])
    plain = conditional(tmp_path / "plain.safetensors")
    places = {"data": labeled, "ckpt": ckpt, "plain": plain}
    done = evaluate("labels", *options.format(**places).split(), "--data", labeled, "--out", tmp_path / "out")
    assert done.code == code, done.err
    assert message in done.err
    assert done.err.count("\n") == 1
