"""The documentation names only what exists: links, anchors, paths, and the code that it quotes."""

import re
from pathlib import Path

import pytest
from rooms import ROOMS
from support import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FOLDERS = "pipeline|export|deploy|k8s|benchmarks|tests|docs"


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.strip().replace("`", "").lower())
    return text.replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, fragment = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or (fragment and fragment not in anchors(found)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    text = re.sub(r"^## \[0\.1\.0\].*", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    paths = re.findall(rf"`((?:{FOLDERS})/[\w./-]*\w)(?:::[^`]*)?`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_rooms_stand_in_the_order_that_is_kept() -> None:
    section = (ROOT / "docs" / "architecture.md").read_text().partition("## Rooms")[2].partition("## ")[0]
    rows = re.findall(r"^\| `([\w/.]+)` \|", section, re.MULTILINE)
    assert [row.removesuffix("/").removesuffix(".py").replace("/", ".") for row in rows] == list(ROOMS)


@pytest.mark.parametrize("folder", ["pipeline", "export", "deploy", "benchmarks", "k8s"])
def test_what_the_code_cites_is_in_the_architecture(folder: str) -> None:
    headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    known = {f"contract {number}" for number in range(1, 10)} | {f'"{heading}"' for heading in headings}
    assert sum(heading.startswith("Contract ") for heading in headings) == 9
    for path in (ROOT / folder).rglob("*.*"):
        if path.suffix in (".py", ".yaml", ".sh", ".md"):
            text = path.read_text()
            assert "DESIGN" not in text, path
            cited = re.findall(r'docs/architecture\.md, (contract \d+|"[^"]*")', text)
            assert set(cited) <= known, path


def quotes() -> list[tuple[str, str]]:
    """Return (path, code) of each quote in docs/extending.md: its first line names the file."""
    page = (ROOT / "docs" / "extending.md").read_text()
    return re.findall(r"^```python\n# (\S+)\n(.*?)\n```", page, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("path", "code"), quotes())
def test_quotes_are_the_code(path: str, code: str) -> None:
    assert code in (ROOT / path).read_text()
