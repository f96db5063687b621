"""The page is whole, shows its pictures in a real browser without a network, and lacks only what the run lacks."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page, find_browser, open_page
from numpy.typing import NDArray
from report_fixture import make_run
from typer.testing import CliRunner

from pipeline.common.errors import DataError, UsageError
from pipeline.common.svg import Line, line_chart, ticks
from pipeline.evaluation.animation import animate
from pipeline.evaluation.charts import bars, sheet
from pipeline.evaluation.cli import app
from pipeline.evaluation.report.report import write_report
from pipeline.evaluation.results import Result

needs_browser = pytest.mark.skipif(
    find_browser() is None and not os.environ.get("CI"), reason="Chromium is not installed; `make system` installs it"
)

SCRIPTS = {
    "pictures": "[...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width, i.alt])",
    "charts": "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)",
    "overflow": "document.documentElement.scrollWidth - document.documentElement.clientWidth",
    "background": "getComputedStyle(document.body).backgroundColor",
    "ink": "getComputedStyle(document.body).color",
    "text": "document.body.innerText",
}


@pytest.fixture(scope="module")
def shown_run(tmp_path_factory: pytest.TempPathFactory, pictures: NDArray[np.uint8]) -> Path:
    """A finished run with results of two commands."""
    folder: Path = tmp_path_factory.mktemp("report") / "demo"
    make_run(folder, pictures)
    swd = Result("swd", folder / "evaluation", {"source": "x"}, settings={"images": 2048, "sha256": "a" * 64})
    swd.chart(bars(["64 px", "mean"], {"these samples": [30.0, 25.0]}, "SWD × 1000"), "By level")
    floor = {"swd": 5.0, "swd_64": 4.5}
    swd.write({"swd": 25.0, "swd_64": 30.0, "real_against_real": floor}, note="Compare with care.",
              published=[{"what": "CelebA", "values": {"swd": 23.26, "swd_64": 8.93}, "source": "zoo"}])  # fmt: skip
    walk = Result("interpolate", folder / "evaluation", {"source": "x"})
    walk.picture(pictures[:9].transpose(1, 0, 2, 3).reshape(64, -1, 3), "Nine steps <b>between</b> two samples")
    walk.write({"steps": 9}, summary="The walk is smooth.", table=[["pair", "roughness"], ["1", 0.25]])
    classes = Result("labels", folder / "evaluation", {"source": "x"})
    rows = [(f"{name}: 9{digit} %", pictures[digit : digit + 8]) for digit, name in enumerate(("none", "male", "both"))]
    classes.picture(sheet(rows, 8), "Samples of each class, and how many the classifier takes for it")
    classes.write({"agreement": 0.95}, summary="A classifier takes 95 % of them for what they were made to be.",
                  table=[["class", "samples", "FID"], ["male", 1000, 12.5]])  # fmt: skip
    moving = Result("progress", folder / "evaluation", {"source": "x"})
    film = Result("walk", folder / "evaluation", {"source": "x"})
    film.animation(b"a film", "mp4", "A film")
    film.write({"frames": 3}, summary="It is a film.")
    moving.animation(animate([*pictures[:3].repeat(2, 1).repeat(2, 2)], "webp", [0.2] * 3), "webp", "Three moments")
    moving.write({"frames": 3}, summary="It moves.")
    bench = {"hardware": {"cpu": "a CPU"}, "rows": [{"backend": "eager", "batch": 1, "images_per_second": 250.5}]}
    (folder / "bench.json").write_text(json.dumps(bench))
    return folder


def look(page: Path, tmp_path: Path, *, width: int = 1280, dark: bool = False) -> Page:
    return open_page(page.as_uri(), tmp_path / "profile", width=width, height=900, dark=dark, scripts=SCRIPTS)


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_browser_without_network_shows_the_whole_page(
    shown_run: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    page = write_report(shown_run, tmp_path / "report.html", bench=[shown_run / "bench.json"])
    assert page.stat().st_size < 5_000_000
    seen = look(page, tmp_path, width=width, dark=dark)
    assert seen.errors == []
    assert seen.requests == [page.as_uri()]
    pictures: list[Any] = seen.values["pictures"]
    assert len(pictures) == 1 + 6 + 1 + 1 + 1  # the newest grid, grids over time, an animation, classes, the walk
    moving = (shown_run / "evaluation/progress.webp").read_bytes()
    assert base64.b64encode(moving).decode() in page.read_text()  # all its frames
    assert f'<video src="data:video/mp4;base64,{base64.b64encode(b"a film").decode()}"' in page.read_text()
    for complete, natural_width, shown_width, alt in pictures:
        assert complete
        assert natural_width > 100
        assert shown_width > 100
        assert alt
    assert len(seen.values["charts"]) == 7
    assert min(seen.values["charts"]) > 100
    assert seen.values["overflow"] <= 0
    text = seen.values["text"]
    for expected in ("5,000 images", "64,000 images", "23.26", "8.93", "real against real", "Compare with care.",
                     "The walk is smooth.", "It moves.",
                     "The class that was wanted", "A classifier takes 95 %", "12.5", "SWD × 1000 was 23.1 at its best",
                     "Nine steps <b>between</b>", "250.5", "a CPU"):  # fmt: skip
        assert expected in text, expected
    brightness = [sum(map(int, seen.values[key][4:-1].split(","))) for key in ("background", "ink")]
    assert (brightness[0] < brightness[1]) is dark


@needs_browser
def test_a_run_that_has_only_begun_has_a_page_too(shown_run: Path, tmp_path: Path) -> None:
    young = tmp_path / "young"
    young.mkdir()
    (young / "config.json").write_bytes((shown_run / "config.json").read_bytes())
    seen = look(write_report(young, tmp_path / "young.html"), tmp_path)
    assert seen.errors == []
    assert seen.values["pictures"] == []
    assert "trained on faces (5,000 images)" in seen.values["text"]
    assert "Curves" not in seen.values["text"]


def test_every_number_has_its_protocol_beside_it(tmp_path: Path, pictures: NDArray[np.uint8]) -> None:
    make_run(tmp_path, pictures)
    folder = tmp_path / "evaluation"
    told = {"samples": "as they are", "extractor_sha256": "a" * 64, "comparable": False, "why_not": "it is small"}
    fid = Result("fid", folder, {"source": "x"}, settings={"images": 2048, "seed": 3})
    fid.protocol = {**told, "images": 2048}
    fid.write({"fid": 25.0})
    nearest = Result("neighbors", folder, {"source": "x"})
    nearest.protocol = {"distance": "cosine, of features", "resize": None}
    nearest.write({"distance": 0.5})
    probe = Result("probe", folder, {"source": "x"}, settings={"label": "kind", "draws": 100, "labels": None})
    values = {"what": "k-means", "values": {"accuracy": 0.806}, "source": "a paper"}
    probe.write({"accuracy": 0.7}, published=[values])
    page = write_report(tmp_path, tmp_path / "page.html").read_text()
    assert (
        "Protocol: samples as they are; extractor sha256 aaaaaaaaaaaa…; comparable with published numbers: no; "
        "because it is small; images 2,048.</p>" in page
    )
    assert "Settings: seed 3.</p>" in page
    assert "Protocol: distance cosine, of features.</p>" in page
    assert "Settings: label kind; draws 100.</p>" in page
    assert "<tr><td>k-means (a paper)</td><td>accuracy 0.806</td></tr>" in page


def test_a_conditional_run_says_what_its_grid_shows(shown_run: Path, tmp_path: Path) -> None:
    plain = write_report(shown_run, tmp_path / "plain.html").read_text()
    assert "64,000 images into training: 64 samples, not selected." in plain
    content = json.loads((shown_run / "config.json").read_text())
    label = {"label": ["male", "bald"], "classes": ["00", "10", "11"], "class_images": [1, 1, 1]}
    content["config"]["network"] |= label
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(content))
    newest = max((shown_run / "samples").iterdir())
    (run / "samples" / newest.name).write_bytes(newest.read_bytes())
    page = write_report(run, tmp_path / "conditional.html").read_text()
    assert "64,000 images into training: 8 samples of each of 3 classes, of the same z, not selected." in page
    assert "male, bald" in page or "&#39;male&#39;, &#39;bald&#39;" in page


def test_what_a_run_says_is_shown_and_never_executed(shown_run: Path, tmp_path: Path) -> None:
    page = write_report(shown_run, tmp_path / "page.html", title="<script>alert(1)</script>").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_a_page_that_grows_too_large_gets_smaller_pictures(
    shown_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = write_report(shown_run, tmp_path / "a.html").stat().st_size
    monkeypatch.setattr("pipeline.evaluation.report.report.LIMIT_BYTES", int(full * 0.75))
    assert write_report(shown_run, tmp_path / "b.html").stat().st_size < full * 0.75
    monkeypatch.setattr("pipeline.evaluation.report.report.LIMIT_BYTES", 1000)
    with pytest.raises(DataError, match=r"over 0 MB: move some results"):
        write_report(shown_run, tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()


def test_bad_input_is_named(shown_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        write_report(tmp_path / "nowhere", tmp_path / "x.html")
    with pytest.raises(DataError, match="expected a run directory"):
        write_report(tmp_path, tmp_path / "x.html")
    with pytest.raises(UsageError, match=r"expected the bench\.json"):
        write_report(shown_run, tmp_path / "x.html", bench=[tmp_path / "bench.json"])
    torn = tmp_path / "torn"
    make_run(torn, np.zeros((64, 64, 64, 3), np.uint8))
    lines = (torn / "metrics.jsonl").read_text().splitlines()
    (torn / "metrics.jsonl").write_text("\n".join([*lines, '{"images": 1']))
    write_report(torn, tmp_path / "x.html")  # a torn last line is what a crash leaves
    (torn / "metrics.jsonl").write_text("\n".join(['{"images": 1', *lines]))
    with pytest.raises(DataError, match=r"metrics.jsonl: line 1 is not JSON"):
        write_report(torn, tmp_path / "x.html")
    save = torn / "samples" / "000006400.png"
    save.write_bytes(save.read_bytes()[:300])
    (torn / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"000006400.png: not a readable picture"):
        write_report(torn, tmp_path / "x.html")


def test_the_command_writes_into_the_run_and_says_where(shown_run: Path) -> None:
    outcome = CliRunner().invoke(app, ["report", str(shown_run)])
    assert outcome.exit_code == 0, outcome.output
    assert f"written: {shown_run / 'report.html'}" in outcome.output
    (shown_run / "report.html").unlink()


def test_ticks_are_round_and_enclose_the_values() -> None:
    for low, high in [(0, 1), (0.013, 0.0131), (-3, 7), (5, 5), (0, 0), (1234, 98765)]:
        marks = ticks(low, high)
        assert marks[0] - 1e-9 <= low <= high <= marks[-1] + 1e-9
        assert 2 <= len(marks) <= 8


def test_a_chart_survives_negative_numbers_that_a_damaged_file_states() -> None:
    assert ticks(0, -1) == ticks(-1, 0)
    assert line_chart([Line("x", [(-1.0, -3.0)])], label="x", zero=True).startswith("<svg")


def test_a_chart_survives_what_a_diverging_run_writes() -> None:
    broken = [(0.0, 1.0), (1.0, float("nan")), (2.0, float("inf")), (3.0, 2.0)]
    drawn = line_chart([Line("loss <d>", broken)], label="Losses")
    assert drawn.count("polyline") == 1
    assert "nan" not in drawn
    assert "inf" not in drawn
    assert "loss &lt;d&gt;" in drawn
    assert line_chart([Line("empty", [])], label="Nothing") == ""


def test_a_run_that_fell_apart_is_marked_and_said_first(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, np.zeros((64, 64, 64, 3), np.uint8))
    sound = write_report(run, tmp_path / "sound.html").read_text()
    assert "fell apart" not in sound
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((run / "config.json").read_text())
    config["config"]["recipe"]["batch"] = 16  # 500 updates are over after 8,000 images
    (run / "config.json").write_text(json.dumps(config))
    for line in lines:
        if line["images"] > 38_400 and "diversity" in line:
            line["diversity"] = 0.05
    lines.append({"images": 64_000, "reverted_to": 38_400})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(run, tmp_path / "page.html").read_text()
    expected = "the run fell apart: after 64,000 images, samples vary 5% as much as real images. "
    assert expected + "At 64,000 images it went back to the weights of 38,400." in page
    assert page.count("<title>fell apart</title>") == page.count("<title>went back to earlier weights</title>") > 5
