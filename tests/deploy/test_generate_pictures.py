"""dcgan-generate --layout folder, --sheet and --latents: plain files with the same pixels."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deploy.generation.plan import Plan
from pipeline.common.imaging import decode, grid
from pipeline.common.randomness import Purpose
from pipeline.model.latents import latents

Run = Callable[..., tuple[str, str]]


def expected(model: str, start: int, count: int) -> np.ndarray:
    from export.samplers.open import open_sampler

    with open_sampler(model) as sampler:
        return np.concatenate([images for _, images in sampler.sample_range(0, start, count, Purpose.SAMPLE)])


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: decode(path.read_bytes()) for path in sorted(folder.glob("0*.png"))}


def test_pictures_are_the_samples_and_a_broken_run_goes_on(run: Run, tmp_path: Path, model: str) -> None:
    options = ["--model", model, "--count", 70, "--start", 50, "--format", "png", "--layout", "folder",
               "--sheet", "2x3", "--encoders", 1]  # fmt: skip
    run(*options, "--out", tmp_path)
    found, wanted = pictures(tmp_path), expected(model, 50, 70)
    assert list(found) == [f"{index:06d}.png" for index in range(50, 120)]
    assert np.array_equal(np.stack(list(found.values())), wanted)
    assert np.array_equal(decode((tmp_path / "sheet.png").read_bytes()), grid(wanted[:6], 3))
    assert {path.name for path in tmp_path.iterdir()} == {*found, "sheet.png", "manifest.json"}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["images"], manifest["plan"]["layout"], len(manifest["made_by"])) == (70, "folder", 1)
    assert "nothing left to do" in run(*options, "--out", tmp_path)[0]
    assert "holds another generation (seed 0 != 1)" in run(*options, "--seed", 1, "--out", tmp_path, code=78)[1]

    (tmp_path / "000060.png").write_bytes(b"cut")
    assert "000060.png: missing or damaged" in run("merge", tmp_path, code=65)[1]
    kept = (tmp_path / "000061.png").stat().st_mtime_ns
    run(*options, "--out", tmp_path)
    assert np.array_equal(np.stack(list(pictures(tmp_path).values())), wanted)
    assert (tmp_path / "000061.png").stat().st_mtime_ns == kept
    assert "70 pictures" in run("merge", tmp_path)[0]


def test_parts_make_the_whole(run: Run, tmp_path: Path, model: str) -> None:
    options = ["--model", model, "--count", 9, "--format", "png", "--layout", "folder", "--shard-images", 4,
               "--out", tmp_path]  # fmt: skip
    assert "other parts are not finished yet" in run(*options, "--part", "1/2")[0]
    assert "missing or damaged" in run("merge", tmp_path, code=75)[1]
    assert not (tmp_path / "manifest.json").exists()
    assert "all 9 images are finished" in run(*options, "--part", "0/2")[0]
    assert np.array_equal(np.stack(list(pictures(tmp_path).values())), expected(model, 0, 9))
    run("merge", tmp_path, "--quick")
    assert not (tmp_path / "records").exists()
    assert "already holds a generation" in run("--model", model, "--count", 9, "--out", tmp_path, code=78)[1]


def test_given_latents_make_the_same_pixels(run: Run, tmp_path: Path, model: str) -> None:
    np.save(tmp_path / "z.npy", latents(0, Purpose.SAMPLE, 130, 5, 100))
    options = ["--model", model, "--latents", tmp_path / "z.npy", "--format", "png", "--layout", "folder"]
    run(*options, "--out", tmp_path / "out")
    assert np.array_equal(np.stack(list(pictures(tmp_path / "out").values())), expected(model, 130, 5))
    shards = tmp_path / "shards"
    run("--model", model, "--latents", tmp_path / "z.npy", "--format", "packed", "--out", shards)
    assert json.loads((shards / "manifest.json").read_text())["plan"]["latents_sha256"]
    np.save(tmp_path / "z.npy", latents(0, Purpose.SAMPLE, 131, 5, 100))
    assert "holds another generation (latents_sha256" in run(*options, "--out", tmp_path / "out", code=78)[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((3, 99), np.float32), "z of 99 values, but the model takes 100"),
        (np.zeros((3, 100)), "float64 (3, 100); expected a .npy of float32"),
        (np.full((3, 100), np.nan, np.float32), "all finite"),
        (np.array([{}]), "not a .npy file of numbers"),
        (None, "not a .npy file"),
    ],
)
def test_other_latents_are_refused(
    run: Run, tmp_path: Path, model: str, given: np.ndarray | None, message: str
) -> None:
    file, out = tmp_path / "z.npy", tmp_path / "out"
    file.write_text("x") if given is None else np.save(file, given, allow_pickle=True)
    error = run(
        "--model", model, "--latents", file, "--out", out, code=2 if given is not None and given.shape[-1] == 99 else 65
    )[1]
    assert message in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sheet", "8by8"], "--sheet 8by8: expected ROWSxCOLUMNS such as 8x8"),
        (["--sheet", "8x8", "--count", 9], "--sheet 8x8: 64 images, but --count is 9"),
        (["--count", 3, "--layout", "folder", "--format", "packed"], "choose --format png, jpg or webp"),
    ],
)
def test_what_cannot_be_is_refused(run: Run, tmp_path: Path, model: str, options: list[object], message: str) -> None:
    assert message in run("--model", model, "--out", tmp_path / "out", *options, code=2)[1]
    assert not (tmp_path / "out").exists()


def test_plans_of_before_keep_their_text(tmp_path: Path) -> None:
    plan = Plan(model_sha256="0" * 64, backend="eager", block_images=64, seed=0, start=0, count=9, latent_dim=100,
                latent_distribution="uniform", image_size=32, channels=3, format="webp", quality=90,
                shard_images=4)  # fmt: skip
    assert plan.model_dump_json().endswith('"quality":90,"shard_images":4}')
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    shutil.rmtree(tmp_path)
