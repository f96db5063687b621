"""The page of a data set says what is in it: classes, sizes, what was left out with pictures of it, what is twice."""

import html
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import find_browser, open_page
from picture_files import as_bytes, make_picture, tree
from PIL import Image


def text_of(page: Path) -> str:
    """Return the words of a page, in one line."""
    body = page.read_text().partition("<main>")[2]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Pictures of two classes and three sizes; one is there twice, one cut off, and one with a hostile name is none."""
    src = tmp_path / "src"
    for index in range(12):
        side = (40, 100, 300)[index % 3]
        folder = src / ("cat" if index < 8 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_picture(index, side, side)).save(folder / f"{index:02d}.png")
    (src / "cat" / "again.png").write_bytes((src / "cat" / "00.png").read_bytes())
    whole = as_bytes(Image.fromarray(make_picture(50, 200, 200)), "JPEG", quality=95)
    (src / "dog" / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (src / "dog" / "<script>alert(1)<.png").write_bytes(b"no picture")
    return src


def test_a_page_shows_classes_sizes_refusals_and_equal_images(dcgan_data: Any, tmp_path: Path, pictures: Path) -> None:
    options = ("--size", 32, "--max-bad", 1, "--workers", 1)
    assert dcgan_data("build", "folder", pictures, tmp_path / "out", *options).code == 0
    before = tree(tmp_path / "out")
    page, sheet = tmp_path / "page.html", tmp_path / "sheet.png"
    done = dcgan_data("show", tmp_path / "out", "--out", sheet, "--html", page, "--source", pictures)
    assert done.code == 0, done.err
    assert f"page: {page}" in done.out
    assert tree(tmp_path / "out") == before
    text = text_of(page)
    for words in ("cat 9", "dog 4", "32 to 47 px 5", "96 to 127 px 4", "256 to 383 px 4", "2 left out"):
        assert words in text, (words, text)
    assert "1 × truncated" in text
    assert "1 × not an image" in text
    assert "equal another one in every pixel: 1." in text
    content = page.read_text()
    assert "<script" not in content
    assert "http://" not in content
    assert content.count("data:image/webp") == 3, "the sheet, the equal image, and what is left of the one cut off"
    assert content.count("nothing to see") == 1
    again = dcgan_data("show", tmp_path / "out", "--out", sheet, "--html", page)
    assert again.code == 0
    assert "With --source SRC" in text_of(page)


def test_sizes_are_counted_once_whatever_the_parts(dcgan_data: Any, tmp_path: Path, pictures: Path) -> None:
    options = ("--size", 32, "--max-bad", 1, "--workers", 1, "--shard-images", 3)
    assert dcgan_data("build", "folder", pictures, tmp_path / "one", *options).code == 0
    for part in range(2):
        out = tmp_path / f"p{part}"
        assert dcgan_data("build", "folder", pictures, out, *options, "--part", f"{part}/2").code == 0
    assert dcgan_data("merge", tmp_path / "cut", tmp_path / "p0", tmp_path / "p1", "--max-bad", 1).code == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "cut")
    sizes = json.loads((tmp_path / "one" / "dataset.json").read_text())["source"]["sizes"]
    assert sizes == {"32": 5, "96": 4, "256": 4}
    assert "already built" in dcgan_data("build", "folder", pictures, tmp_path / "one", *options).out


def test_pages_of_sets_without_sizes_labels_or_refusals(dcgan_data: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.stack([make_picture(i, 16, 16) for i in range(9)]), score=np.arange(9) / 2)
    assert dcgan_data("build", "arrays", tmp_path / "a.npz", tmp_path / "out", "--size", 16, "--workers", 1).code == 0
    path = tmp_path / "out" / "dataset.json"
    described = json.loads(path.read_text())
    del described["source"]["sizes"]  # as 0.1.0 wrote it
    path.write_text(json.dumps(described))
    done = dcgan_data("show", tmp_path / "out", "--out", tmp_path / "s.png", "--html", tmp_path / "page.html")
    assert done.code == 0, done.err
    text = text_of(tmp_path / "page.html")
    assert "Nothing was left out" in text
    assert "No two images are equal" in text
    assert "Sizes before" not in text
    assert "9 images" in text


def test_what_a_page_cannot_be_is_one_line(dcgan_data: Any, tmp_path: Path, pictures: Path) -> None:
    options = ("--size", 32, "--max-bad", 1, "--workers", 1)
    assert dcgan_data("build", "folder", pictures, tmp_path / "out", *options).code == 0
    page, sheet = tmp_path / "page.html", ("--out", tmp_path / "sheet.png")
    cases: list[tuple[tuple[Any, ...], int, str]] = [
        (("--source", pictures), 2, "applies to --html only"),
        (("--html", page, "--source", tmp_path / "nosuch"), 2, "no such folder or archive"),
        (("--html", tmp_path / "out"), 2, "out"),
    ]
    for words, code, said in cases:
        refused = dcgan_data("show", tmp_path / "out", *sheet, *words)
        assert (refused.code, said in refused.err) == (code, True), refused.err
        assert not page.exists()


@pytest.mark.skipif(
    find_browser() is None and not os.environ.get("CI"), reason="Chromium is not installed; `make system` installs it"
)
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (390, True)])
def test_a_browser_shows_the_page(dcgan_data: Any, tmp_path: Path, pictures: Path, width: int, dark: bool) -> None:
    options = ("--size", 32, "--max-bad", 1, "--workers", 1)
    assert dcgan_data("build", "folder", pictures, tmp_path / "out", *options).code == 0
    page = tmp_path / "page.html"
    shown = ("--out", tmp_path / "sheet.png", "--html", page, "--source", pictures)
    assert dcgan_data("show", tmp_path / "out", *shown).code == 0
    scripts = {
        "pictures": "[...document.images].map(i => [i.complete, i.naturalWidth, i.alt])",
        "bars": "[...document.querySelectorAll('.bars i')].map(i => i.getBoundingClientRect().width)",
        "overflow": "document.documentElement.scrollWidth - document.documentElement.clientWidth",
    }
    (tmp_path / "browser").mkdir()
    seen = open_page(page.as_uri(), tmp_path / "browser", width=width, height=900, dark=dark, scripts=scripts)
    assert seen.errors == []
    assert [url for url in seen.requests if not url.startswith("file:")] == []
    assert len(seen.values["pictures"]) == 3
    assert all(complete and natural and alt for complete, natural, alt in seen.values["pictures"])
    assert len(seen.values["bars"]) == 5, "two classes, three sizes"
    assert max(seen.values["bars"]) > 3 * min(seen.values["bars"]) / 2
    assert seen.values["overflow"] <= 0
    (tmp_path / "page.png").write_bytes(seen.screenshot)
