"""`dcgan-data clear` removes what a build wrote and nothing else, and asks before."""

import io
from pathlib import Path
from typing import Any

import pytest
from picture_files import make_folder, tree
from support import write_dataset

from pipeline.common.storage import Store
from pipeline.data.build.clear import clear

SMALL = ("--size", 8, "--shard-images", 5, "--workers", 1)


def test_parts_do_not_overwrite_each_other(dcgan_data: Any, tmp_path: Path) -> None:
    src, out = make_folder(tmp_path / "src", 20), tmp_path / "out"
    command = ["build", "folder", src, out, *SMALL]
    assert dcgan_data(*command, "--seed", 1).code == 0
    before = tree(out)
    refused = dcgan_data(*command, "--part", "0/2", "--overwrite")
    assert (refused.code, f"`dcgan-data clear {out}` once" in refused.err) == (2, True), refused.err
    other = dcgan_data(*command, "--part", "0/2")
    assert (other.code, "`dcgan-data clear` removes it first" in other.err) == (78, True), other.err
    assert tree(out) == before
    assert dcgan_data("clear", out, "--yes").code == 0
    for part in ("0/2", "1/2"):
        assert dcgan_data(*command, "--part", part).code == 0
    assert dcgan_data("merge", out).code == 0


@pytest.mark.parametrize("place", ["disk", "store"])
@pytest.mark.parametrize("what", ["finished", "unfinished", "split"])
def test_only_what_a_build_wrote_goes(dcgan_data: Any, tmp_path: Path, place: str, what: str) -> None:
    src = make_folder(tmp_path / "src", 20)
    (src / "broken.png").write_bytes(b"x")  # so that there is a refused.txt
    out = str(tmp_path / "out") if place == "disk" else f"memory://clear-{what}"
    options = {"finished": (), "unfinished": ("--part", "0/2"), "split": ("--val-fraction", "0.5")}[what]
    assert dcgan_data("build", "folder", src, out, *SMALL, "--max-bad", 0.5, *options).code == 0
    done = dcgan_data("clear", out, "-y")
    assert done.code == 0, done.err
    assert "removed the" in done.out
    assert Store(out).names() == []
    again = dcgan_data("clear", out, "-y")
    assert (again.code, "nothing to remove" in again.out) == (0, True)


def test_files_of_others_stay(dcgan_data: Any, tmp_path: Path) -> None:
    src, out = make_folder(tmp_path / "src", 20), tmp_path / "out"
    assert dcgan_data("build", "folder", src, out, *SMALL).code == 0
    (out / "notes.txt").write_text("mine")
    (out / "photos.tar").write_bytes(b"mine")
    (out / "sheet.png").write_bytes(b"mine")
    assert dcgan_data("clear", out, "--yes").code == 0
    assert set(tree(out)) == {"notes.txt", "photos.tar", "sheet.png"}


def test_a_folder_that_is_not_ours_is_refused(dcgan_data: Any, tmp_path: Path) -> None:
    (tmp_path / "home" / ".build").mkdir(parents=True)
    (tmp_path / "home" / ".build" / "debug.yaml").write_text("of Swift")
    (tmp_path / "home" / "000000.tar").write_bytes(b"years of work")
    write_dataset(tmp_path / "by hand", images=8)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "dataset.json").write_text('{"name": "of another program"}')
    before = tree(tmp_path)
    for name, code in (("home", 2), ("by hand", 2), ("other", 65)):
        done = dcgan_data("clear", tmp_path / name, "--yes")
        assert done.code == code, done.err
    assert "an http server is only read" in dcgan_data("clear", "http://127.0.0.1:9/set", "--yes").err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("answer", ["n\n", "y\n"])
def test_it_asks_where_somebody_can_answer(
    dcgan_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    src, out = make_folder(tmp_path / "src", 20), tmp_path / "out"
    assert dcgan_data("build", "folder", src, out, *SMALL).code == 0
    alone = dcgan_data("clear", out)
    assert (alone.code, "add --yes" in alone.err) == (2, True), alone.err
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    done = dcgan_data("clear", out)
    assert (done.code, bool(tree(out))) == ((2, True) if answer == "n\n" else (0, False)), done.err


@pytest.mark.parametrize("place", ["disk", "store"])
def test_two_concurrent_clears_do_no_harm(
    dcgan_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The second one runs between any two removals of the first; the build that follows is whole."""
    src = make_folder(tmp_path / "src", 20)
    assert dcgan_data("build", "folder", src, tmp_path / "whole", *SMALL).code == 0
    delete, write = Store.delete, Store.write
    for moment in range(40):
        out = str(tmp_path / f"out{moment}") if place == "disk" else f"memory://clears-{moment}"
        assert dcgan_data("build", "folder", src, out, *SMALL, "--part", "0/2").code == 0
        left = [moment]

        def interrupted(do: Any, *arguments: Any, out: str = out, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                clear(out, out)
            do(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "delete", lambda *arguments, do=interrupted: do(delete, *arguments))
            patch.setattr(Store, "write", lambda *arguments, do=interrupted: do(write, *arguments))
            clear(out, out)
        assert Store(out).names() == []
        if left[0] >= 0:
            break
        if moment % 4 == 0:
            assert dcgan_data("build", "folder", src, out, *SMALL).code == 0
            assert place == "store" or tree(Path(out)) == tree(tmp_path / "whole")
    assert moment > 5
    assert left[0] >= 0
