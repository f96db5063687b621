"""dcgan-generate: the same images however the work is cut, stopped, repeated or merged."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from deploy.generation.folder import require_same_plan
from deploy.generation.manifest import MANIFEST, RECORDS, begin, merge, reopen
from pipeline.common.errors import DataError, TryAgainError
from pipeline.common.imaging import decode, encode
from pipeline.common.randomness import Purpose
from pipeline.common.storage import Store
from pipeline.data.dataset import DATASET_FILE, Encoding, open_dataset
from pipeline.data.shard_reader import iterate

Start = Callable[..., "subprocess.Popen[str]"]
Run = Callable[..., tuple[str, str]]


def members(*folders: Path) -> dict[str, bytes]:
    """Map the index of every image to its bytes, as any tar reader sees them; no index may come twice."""
    images: dict[str, bytes] = {}
    for path in sorted(path for folder in folders for path in folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: content.read() for member in tar if (content := tar.extractfile(member))}
        for name, data in files.items():
            if name.endswith(".json"):
                key = json.loads(data)["key"]
                image = next(value for other, value in files.items() if other[:-4] == name[:-4] and other != name)
                if isinstance(key, str):
                    assert key not in images
                    images[key] = image
    return images


def files(folder: Path) -> dict[str, Any]:
    """Return what every file holds; of the manifest not the versions, since this process imports more for its tests."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    if "manifest.json" in found:
        found["manifest.json"] = json.loads(found["manifest.json"])
        for maker in found["manifest.json"]["made_by"]:
            assert maker.pop("versions")["python"]
    return found


def packed(*folders: Path) -> np.ndarray:
    return np.concatenate([images for folder in folders for images in iterate(open_dataset(folder))])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """1,000 images made in one go, in shards of 96: no multiple of a block of 64, as a worst case."""
    folder = tmp_path_factory.mktemp("whole")
    command = [str(Path(sys.executable).with_name("dcgan-generate")), "--model", model, "--count", "1000"]
    subprocess.run([*command, "--shard-images", "96", "--out", str(folder)], check=True)
    return folder


def test_four_ranges_are_the_whole(run: Run, tmp_path: Path, model: str, whole: Path) -> None:
    parts = [tmp_path / str(first) for first in range(0, 1000, 250)]
    for part in parts:
        run("--model", model, "--count", 250, "--start", part.name, "--shard-images", 96, "--out", part)
    expected = members(whole)
    assert list(expected) == [f"{index:012d}" for index in range(1000)]
    assert len(set(expected.values())) == 1000
    assert members(*parts) == expected


def test_parts_merge_to_the_same_files(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str, whole: Path
) -> None:
    options = ["--model", model, "--count", 1000, "--shard-images", 96, "--out", tmp_path]
    for index in ("2", "0", "1"):
        assert not (tmp_path / "dataset.json").exists()
        monkeypatch.setenv("JOB_COMPLETION_INDEX", index)
        run(*options, "--part", 3)
    assert files(tmp_path) == files(whole)


def test_killed_and_resumed_is_the_same(start: Start, tmp_path: Path, model: str, whole: Path) -> None:
    options = ["--model", model, "--count", 1000, "--shard-images", 96, "--out", tmp_path, "--batch", 64]
    kills = 0
    for pattern, target in (("*", 1), ("*.tar", 1), ("*.tar", 6)):
        process = start("dcgan-generate", *options)
        while process.poll() is None and len(list(tmp_path.glob(pattern))) < target:
            time.sleep(0.001)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills  # else nothing was tried
    assert start("dcgan-generate", *options).wait() == 0
    assert files(tmp_path) == files(whole)


def test_sigterm_keeps_whole_shards_and_says_so(start: Start, tmp_path: Path, model: str, whole: Path) -> None:
    options = ["--model", model, "--shard-images", 96, "--out", tmp_path, "--count", 1_000_000]
    process = start("dcgan-generate", *options)
    while not list(tmp_path.glob("*.tar")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped: " in error.splitlines()[-1]
    found = members(tmp_path)
    assert found.items() <= members(whole).items() or len(found) > 1000
    assert len(found) % 96 == 0
    assert not (tmp_path / "dataset.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("encoding", ["webp", "jpg", "png", "packed"])
def test_every_format_is_a_data_set_and_plain_webdataset(
    run: Run, tmp_path: Path, model: str, encoding: Encoding
) -> None:
    run("--model", model, "--count", 300, "--start", 50, "--format", encoding, "--out", tmp_path)
    dataset = open_dataset(tmp_path)
    assert (dataset.images, dataset.encoding, dataset.image_size) == (300, encoding, 32)
    reference = sample(model, 50, 300)
    images = packed(tmp_path)
    if encoding != "packed":
        quality = {} if encoding == "png" else {"quality": 90}
        reference = np.stack([decode(encode(image, encoding, **quality)) for image in reference])
    np.testing.assert_array_equal(images, reference)
    stock = wds.WebDataset([str(path) for path in sorted(tmp_path.glob("*.tar"))], shardshuffle=False).decode()
    assert len(list(stock)) == (2 if encoding == "packed" else 300)


def sample(model: str, first: int, count: int) -> np.ndarray:
    """What the sampler alone makes."""
    from export.samplers.open import open_sampler

    with open_sampler(model) as sampler:
        return np.concatenate([images for _, images in sampler.sample_range(0, first, count, Purpose.SAMPLE)])


def test_run_again_it_is_done_in_no_time(run: Run, tmp_path: Path, model: str) -> None:
    options = ["--model", model, "--count", 100, "--out", tmp_path]
    run(*options)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    out, _ = run(*options)
    assert "nothing left to do" in out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", ["cut", "flip", "delete"])
def test_merge_finds_damage_and_the_same_command_mends_it(run: Run, tmp_path: Path, model: str, damage: str) -> None:
    options = ["--model", model, "--count", 400, "--shard-images", 96, "--out", tmp_path]
    run(*options)
    good = files(tmp_path)
    shard = sorted(tmp_path.glob("*.tar"))[2]
    data = bytearray(shard.read_bytes())
    if damage == "delete":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(data[:5000])
    else:
        data[1500] ^= 1
        shard.write_bytes(data)
    _, error = run("merge", tmp_path, code=65)
    assert shard.name in error
    assert not (tmp_path / "dataset.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar") if path != shard}
    run(*options)
    assert files(tmp_path) == good
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    run("merge", tmp_path)


def test_a_damaged_shard_is_made_again_on_resume(run: Run, tmp_path: Path, model: str, whole: Path) -> None:
    options = ["--model", model, "--count", 1000, "--shard-images", 96, "--out", tmp_path]
    run(*options, "--part", "0/2")
    shard = min(tmp_path.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1])
    _, error = run(*options, "--part", "1/2", code=65)  # would be the last: all records are there
    assert f"{shard.name}: " in error
    assert not (tmp_path / "dataset.json").exists()
    run("merge", tmp_path, code=75)
    run(*options, "--part", "0/2")
    assert files(tmp_path) == files(whole)


def test_merge_waits_for_every_part(run: Run, tmp_path: Path, model: str) -> None:
    run("--model", model, "--count", 500, "--shard-images", 96, "--out", tmp_path, "--part", "1/2")
    _, error = run("merge", tmp_path, code=75)
    assert "3 of 6 shards" in error
    with pytest.raises(TryAgainError):
        merge(Store(tmp_path))


def test_parts_of_different_models_do_not_mix(
    run: Run, tmp_path: Path, make_model: Callable[[int], Path], model: str
) -> None:
    options = ["--count", 500, "--shard-images", 96, "--out", tmp_path]
    other = make_model(1)
    run("--model", model, *options, "--part", "0/2")
    _, error = run("--model", other, *options, "--part", "1/2", code=78)
    assert "model_sha256" in error
    # Even where two first writers raced for the plan, the records tell.
    record = min((tmp_path / RECORDS).glob("0*.json"))
    values = json.loads(record.read_text()) | {"plan_sha256": "0" * 64}
    record.write_text(json.dumps(values))
    (tmp_path / RECORDS / "aside.json").write_bytes(record.read_bytes())
    run("--model", model, *options, "--part", "1/2", code=65)
    with pytest.raises(DataError, match="another model"):
        merge(Store(tmp_path))


def test_merge_removes_what_killed_parts_left_behind(run: Run, tmp_path: Path, model: str) -> None:
    run("--model", model, "--count", 200, "--shard-images", 96, "--out", tmp_path)
    (tmp_path / "samples-000000000000-0123456789ab.tar").write_bytes(b"made on another device")
    (tmp_path / ".samples-000000000096-0123456789ab.tar.x.tmp").write_bytes(b"half written")
    (tmp_path / "notes.txt").write_text("mine")
    run("merge", tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"manifest.json", "dataset.json", "notes.txt", *(s.name for s in open_dataset(tmp_path).shards)}


def test_a_record_that_contradicts_itself_is_named(run: Run, tmp_path: Path, model: str) -> None:
    options = ["--model", model, "--count", 200, "--shard-images", 96, "--out", tmp_path]
    run(*options, "--part", "0/2")
    path = min((tmp_path / "records").iterdir())
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "shard": {**record["shard"], "offsets": []}}))
    error = run(*options, "--part", "1/2", code=65)[1]
    assert f"error: {path}: damaged; delete it and run its part again" in error


@pytest.mark.parametrize("fault", ["missing", "short", "foreign"])
def test_what_a_listing_contradicts_is_not_committed(run: Run, tmp_path: Path, model: str, fault: str) -> None:
    """Neither by the part that ends last nor by a quick merge; the same command makes again what is missing."""
    out = tmp_path / "out"
    options = ["--model", model, "--count", 300, "--shard-images", 96]
    run(*options, "--out", tmp_path / "whole")
    run(*options, "--out", out, "--part", "0/2")
    shard = min(out.glob("*.tar"))
    data = shard.read_bytes()

    def hurt() -> Path:
        if fault == "foreign":
            (out / "samples-000000000500-0123456789ab.tar").write_bytes(b"of another generation")
            return out / "samples-000000000500-0123456789ab.tar"
        shard.unlink()
        if fault == "short":
            shard.write_bytes(data[:-1])
        return shard

    named = hurt()
    _, error = run(*options, "--out", out, "--part", "1/2", code=65)
    assert f"error: {named}: " in error
    assert not (out / "dataset.json").exists()
    assert not (out / "manifest.json").exists()
    if fault == "foreign":
        named.unlink()
    run(*options, "--out", out, "--part", "0/2")
    assert files(out) == files(tmp_path / "whole")
    named = hurt()
    _, error = run("merge", out, "--quick", code=65)
    assert f"error: {named}: " in error
    assert (out / "dataset.json").exists() is (fault == "foreign")
    if fault == "foreign":
        named.unlink()
    run(*options, "--out", out)
    run("merge", out)
    assert files(out) == files(tmp_path / "whole")


def test_two_writers_of_the_same_part_do_no_harm(
    start: Start, run: Run, tmp_path: Path, model: str, whole: Path
) -> None:
    options = ["--model", model, "--count", 1000, "--shard-images", 96, "--out", tmp_path]
    twins = [start("dcgan-generate", *options) for _ in range(2)]
    for twin in twins:
        _, error = twin.communicate(timeout=120)
        assert twin.returncode == 0, error
    run("merge", tmp_path)
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize("state", ["unfinished", "manifest", "data set"])
@pytest.mark.parametrize("look", range(6))
def test_a_generation_that_others_finish_while_one_begins_is_no_other(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, state: str, look: int
) -> None:
    """`merge` writes the manifest, the data set, and removes the plan: here all that is left, after any look."""
    exists, out = Store.exists, tmp_path / "out"
    shutil.copytree(whole, out)
    finished = merge(store := Store(out))
    reopen(finished, open_dataset(store), set())
    if state != "unfinished":
        shutil.copy(whole / MANIFEST, out)
    if state == "data set":
        shutil.copy(whole / DATASET_FILE, out)
    looks = 0

    def look_then_finish(store: Store, name: str) -> bool:
        nonlocal looks
        found, looks = exists(store, name), looks + 1
        if looks == look + 1:
            merge(Store(out), tidy=True)
        return found

    monkeypatch.setattr(Store, "exists", look_then_finish)
    begin(store, finished.plan)
    looks = 0
    require_same_plan(store, finished.plan)


def test_the_manifest_says_where_images_came_from(whole: Path, model: str) -> None:
    from pipeline.common.storage import sha256_file

    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["plan"]["model_sha256"] == sha256_file(Path(model))
    assert (manifest["plan"]["seed"], manifest["plan"]["start"], manifest["plan"]["count"]) == (0, 0, 1000)
    assert manifest["plan"]["purpose"] == "sample"
    assert manifest["plan"]["block_images"] == 64
    (made_by,) = manifest["made_by"]
    assert made_by["device"] == "cpu"
    assert made_by["processor"]
    assert {"python", "numpy", "dcgan-pipeline"} <= set(made_by["versions"])
    assert not {"pytest", "mypy", "hypothesis"} & set(made_by["versions"]), "tools of development made no image"
    for shard in manifest["shards"]:
        assert sha256_file(whole / shard["name"]) == shard["sha256"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 2, "--model"),
        (["--model", "nosuch.onnx", "--count", 5, "--out", "OUT"], 65, "nosuch.onnx"),
        (["--model", "MODEL", "--count", 0, "--out", "OUT"], 2, "--count"),
        (["--model", "MODEL", "--count", -3, "--out", "OUT"], 2, "--count"),
        (["--model", "MODEL", "--count", 5, "--out", "OUT", "--part", "2/2"], 2, "--part"),
        (["--model", "MODEL", "--count", 5, "--out", "OUT", "--part", "4"], 2, "JOB_COMPLETION_INDEX"),
        (["--model", "MODEL", "--count", 5, "--out", "OUT", "--seed", -1], 2, "seed"),
        (["--model", "MODEL", "--count", 5, "--out", "OUT", "--batch", 0], 2, "--batch"),
        (["--model", "MODEL", "--count", 5, "--out", "OUT", "--encoders", 0], 2, "--encoders"),
        (["--model", "MODEL", "--count", 5, "--out", "ftp://there/x"], 2, "ftp"),
        (["--model", "MODEL", "--count", 5, "--out", "/proc/nowhere"], 2, "/proc/nowhere"),
        (["merge", "OUT"], 65, "no generation"),
    ],
)
def test_mistakes_are_one_line(
    run: Run, tmp_path: Path, model: str, options: list[object], code: int, words: str
) -> None:
    names = {"MODEL": model, "OUT": tmp_path / "out"}
    _, error = run(*[names.get(str(option), option) for option in options], code=code)
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_a_full_disk_loses_nothing(run: Run, tmp_path: Path, model: str, whole: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
    try:
        options = ["--model", model, "--count", 1000, "--shard-images", 96, "--out", disk]
        _, error = run(*options, code=75)
        assert "No space left" in error
        assert "run the same command again" in error
        assert not list(disk.rglob("*.tmp"))
        assert 0 < len(list(disk.glob("*.tar"))) < 11
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        run(*options)
        assert files(disk) == files(whole)
    finally:
        subprocess.run(["umount", disk], check=True)
