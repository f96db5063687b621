"""What lies in OUT already is neither lost nor mistaken for something else, whenever a command was killed."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from picture_files import make_folder, make_picture, tree

from pipeline.common.imaging import encode
from pipeline.common.storage import Store
from pipeline.data.build.plan import key_hash
from pipeline.data.build.state import STATE_FILE, STATE_FOLDER
from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate

SMALL = ("--size", 8, "--shard-images", 5, "--workers", 1)


class Killed(BaseException):
    """The end of the process."""


def kill_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> None:
    """Let `owner.name` work for so many calls, and kill the process at the next one."""
    real: Callable[..., Any] = getattr(owner, name)
    left = [calls]

    def function(*arguments: Any, **options: Any) -> Any:
        if not left[0]:
            raise Killed
        left[0] -= 1
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize("command", ["build", "dedup"])
def test_what_is_read_is_never_what_is_replaced(dcgan_data: Any, tmp_path: Path, command: str) -> None:
    shards = tmp_path / "shards"
    assert dcgan_data("build", "folder", make_folder(tmp_path / "src", 12), shards, *SMALL).code == 0
    assert dcgan_data("build", "folder", tmp_path / "src", tmp_path / "both" / "train", *SMALL).code == 0
    (tmp_path / "link").symlink_to(shards)
    before = tree(tmp_path)
    for src, out in (
        (shards, shards),
        (tmp_path / "link", shards),
        (f"{shards}/", f"file://{shards}"),
        (shards, tmp_path / "link"),
        (tmp_path / "both" / "train", tmp_path / "both"),
        (shards / "000000.tar", shards),
        ("s3://bucket/set/", "s3://bucket/set"),
        ("s3://bucket/set/train", "s3://bucket/set"),
    ):
        source = ["webdataset", src] if command == "build" else [src]
        done = dcgan_data(
            command, *source, out, *(["--val-fraction", 0.5] if command == "build" else []), "--overwrite"
        )
        assert (done.code, "choose another OUT" in done.err) == (2, True), (src, out, done.err)
    assert tree(tmp_path) == before
    assert (
        dcgan_data("build", "webdataset", shards, tmp_path / "shards-2", *SMALL).code == 0
    )  # a longer name is no part


def parts_of(dcgan_data: Any, src: Path, folder: Path, *options: object) -> list[Path]:
    parts = [folder / str(index) for index in range(2)]
    for index, part in enumerate(parts):
        assert dcgan_data("build", "folder", src, part, *SMALL, *options, "--part", f"{index}/2").code == 0
    return parts


def test_merge_takes_no_other_data_set_for_its_own(dcgan_data: Any, tmp_path: Path) -> None:
    src, out = make_folder(tmp_path / "src", 20), tmp_path / "out"
    parts = parts_of(dcgan_data, src, tmp_path / "parts")
    assert dcgan_data("build", "folder", src, out, *SMALL, "--seed", 7).code == 0
    other = tree(out)
    done = dcgan_data("merge", out, *parts)
    assert (done.code, "seed=7 there, 0 now" in done.err) == (78, True), done.err
    assert tree(out) == other
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "000000.tar").write_bytes(b"years of work")
    done = dcgan_data("merge", foreign, *parts)
    assert (done.code, "not a data set of dcgan-data" in done.err) == (2, True), done.err
    assert list(tree(foreign)) == ["000000.tar"]
    for _ in range(2):  # the second time all is there already
        assert dcgan_data("merge", tmp_path / "merged", *parts).code == 0
    assert dcgan_data("build", "folder", src, tmp_path / "whole", *SMALL).code == 0
    assert tree(tmp_path / "merged") == tree(tmp_path / "whole")


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_an_overwrite_killed_at_any_moment_goes_on(
    dcgan_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """And whichever build comes next takes nothing of the old one for its own."""
    src, old = make_folder(tmp_path / "src", 20), tmp_path / "old"
    (src / "broken.png").write_bytes(b"x")  # so that there is a refused.txt
    command = ["build", "folder", src]
    some = [*SMALL, "--max-bad", 0.5]
    part = ["--part", "0/2"] if state == "unfinished" else []
    assert dcgan_data(*command, old, *some, "--seed", 1, *part).code == 0
    (old / "sheet.png").write_bytes(b"not ours to remove")
    wholes = {}
    for seed in (1, 2):
        assert dcgan_data(*command, tmp_path / f"whole{seed}", *some, "--seed", seed).code == 0
        wholes[seed] = {**tree(tmp_path / f"whole{seed}"), "sheet.png": b"not ours to remove"}
    for kills in range(30):
        for seed, overwrite in ((2, ["--overwrite"]), (1, ["--overwrite"]), (1, [])):
            out = tmp_path / f"out-{kills}-{seed}-{len(overwrite)}"
            shutil.copytree(old, out)
            with monkeypatch.context() as patch:
                kill_after(patch, Store, "delete", kills)
                try:
                    dcgan_data(*command, out, *some, "--seed", 2, "--overwrite")
                    survived = True
                except Killed:
                    survived = False
            complete = (out / "dataset.json").exists() and open_dataset(out).source["seed"] == 2
            done = dcgan_data(*command, out, *some, "--seed", seed, *overwrite)
            if complete and seed == 1 and not overwrite:
                assert done.code == 78
                continue
            assert done.code == 0, (kills, seed, overwrite, done.err)
            assert tree(out) == wholes[seed], (kills, seed, overwrite)
        if survived:
            break
    assert kills > 4
    assert survived


def test_a_merge_killed_while_it_tidies_up_is_finished(
    dcgan_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, out = make_folder(tmp_path / "src", 20), tmp_path / "out"
    for index in range(2):
        assert dcgan_data("build", "folder", src, out, *SMALL, "--part", f"{index}/2").code == 0

    def remove_some(path: Path) -> None:
        for record in sorted(path.glob("0*.json")):
            record.unlink()
        raise Killed

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(shutil, "rmtree", remove_some)
        dcgan_data("merge", out)
    assert (out / STATE_FILE).exists()
    done = dcgan_data("merge", out)
    assert done.code == 0, done.err
    assert not (out / STATE_FOLDER).exists()
    assert dcgan_data("build", "folder", src, tmp_path / "whole", *SMALL).code == 0
    assert tree(out) == tree(tmp_path / "whole")


def test_a_fault_that_may_pass_is_not_recorded_as_a_bad_picture(dcgan_data: Any, tmp_path: Path) -> None:
    """Reading a process's memory at address 0 is an input/output error, as of a disk or a network that is away."""
    src, out = make_folder(tmp_path / "src", 100), tmp_path / "out"
    last = max((f"{index}.png" for index in range(1000)), key=lambda name: key_hash(0, name))
    for name in (last, min((f"{index}.png" for index in range(1000)), key=lambda name: key_hash(0, name))):
        (src / name).symlink_to("/proc/self/mem")
        done = dcgan_data("build", "folder", src, out, *SMALL, "--max-bad", 1)
        assert done.code == 75, done.err
        assert f"{name}: Input/output error. Run the same command again" in done.err
        assert not (out / "dataset.json").exists()
        if name == last:  # the probe for the plan did not meet it, so some groups are done
            assert len(list((out / STATE_FOLDER).glob("0*.json"))) > 10
            (src / name).unlink()
            (src / name).touch()  # as large as the link's target claims to be, so the listing is the same
            assert dcgan_data("build", "folder", src, out, *SMALL, "--max-bad", 1).code == 0
            assert open_dataset(out).refused.reasons == {"empty file": 1}
            shutil.rmtree(out)


def test_the_split_of_the_source_is_recorded_beside_ours(dcgan_data: Any, tmp_path: Path) -> None:
    for number in (1, 2, 60_000, 60_001):
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / f"{number:05d}.png").write_bytes(encode(make_picture(number, 16, 16), "png"))
    command = ["build", "ffhq", tmp_path / "src", tmp_path / "out", *SMALL]
    assert dcgan_data(*command, "--split", "train").code == 0
    source = open_dataset(tmp_path / "out").source
    assert (source["source_split"], source["split"]) == ("train", "all")
    other = dcgan_data(*command, "--split", "val")
    assert (other.code, "source_split='train' there, 'val' now" in other.err) == (78, True), other.err
    assert len(next(iterate(open_dataset(tmp_path / "out")))) == 2
