"""Every notation that the ecosystem has for tars names the right ones; what means nothing is refused in one line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from braceexpand import braceexpand
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.common.errors import DataError, UsageError, UserError
from pipeline.data import specification
from pipeline.data.specification import expand, is_dataset, is_specification, short_names

ZERO, ONE, OTHER, ODD = TARS = ["a/lsun-000000.tar", "a/lsun-000001.tar", "b/x.tar", "odd[1].tar"]
HUB = "hf://datasets/someone/faces"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with TARS and some other files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WDS_SET", "lsun-{000000..000001}")
    monkeypatch.setenv("WDS_MANY", "{0..1000000000000}")
    for name in [*TARS, "a/lsun-000000.idx", "a/._lsun-000000.tar", "b/notes.txt", "c/notes.txt", "ours/0.tar"]:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    Path("ours/dataset.json").touch()
    lines = ["# two lines, three tars", "", "../a/lsun-{000000,000001}.tar", "  ../b/*.tar ", ""]
    Path("c/list.txt").write_text("\r\n".join(lines), encoding="utf-8-sig")
    shards = [{"url": name, "nsamples": 1, "filesize": 0} for name in (ZERO, ONE)]
    Path("wids.json").write_text(json.dumps({"wids_version": 1, "shardlist": shards}))
    shards = [{"url": "lsun-000001.tar"}, {"url": str(tmp_path / OTHER)}]
    Path("based.json").write_text(json.dumps({"base": "a", "shardlist": shards}))
    for name, content in BAD_FILES.items():
        Path(name).write_bytes(content)
    return tmp_path


BAD_FILES = {
    "nested.txt": b"@c/list.txt\n",
    "pipe.txt": b"pipe:cat a/lsun-000000.tar\n",
    "variable.txt": b"${SET}.tar\n",
    "zero.txt": b"a\0*.tar\n",
    "empty.txt": b"# nothing\n",
    "binary.txt": b"\xff\xfe",
    "no.json": b"{",
    "list.json": b"[1]",
    "none.json": b'{"shardlist": []}',
    "other.json": b'{"shardlist": {"url": "x"}}',
    "holes.json": b'{"shardlist": [{"url": "a/lsun-000000.tar"}, {"nsamples": 1}]}',
    "more.json": b'{"shardlist": [{"url": "a/lsun-000000.tar"}], "datasets": [{"source_url": "https://host/x.json"}]}',
    "pipe.json": b'{"shardlist": [{"url": "pipe:touch ran"}]}',
    "deep.json": b"[" * 100_000,
}

PATTERNS = r"""
{0..9} {07..1} {-2..2} {0..9..4} {9..0..0} {a..f}{Z..X} {a,b}{,x} {,} {a,{0..9},{b,c}{d,e}} {x} {} {0..9,a} {1..a}
{1..2..x} a,b{0..1} {{0..3}} \{0..9\}{1,2} {a\,b,c}
"""


@pytest.fixture
def stores() -> Iterator[None]:
    """Tars in a bucket under memory:// and, as the Hub keeps them, under hf://; no network."""

    class Hub(MemoryFileSystem):  # type: ignore[misc]
        protocol = "hf"
        cachable = False
        store: ClassVar[dict[str, Any]] = {}
        pseudo_dirs: ClassVar[list[str]] = [""]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("hf://").strip("/")

    memory = MemoryFileSystem()
    fsspec.register_implementation("hf", Hub, clobber=True)
    for files, root in ((memory, "/bucket"), (Hub(), "/datasets/someone/faces")):
        for name in ("train/0.tar", "train/1.tar", "val/0.tar", "train/README.md"):
            files.pipe(f"{root}/{name}", b"")
    memory.pipe("/bucket/list.txt", f"train/{{0..1}}.tar\n{HUB}/val/0.tar\n".encode())
    memory.pipe("/bucket/local.txt", b"/etc/passwd.tar\n")
    memory.pipe("/bucket/local.json", b'{"base": "/etc", "shardlist": [{"url": "passwd.tar"}]}')
    memory.pipe("/bucket/loose.tar", b"")
    memory.pipe("/ours/dataset.json", b"{}")
    memory.pipe("/ours/0.tar", b"")
    yield
    memory.store.clear()
    fsspec.register_implementation("hf", "huggingface_hub.HfFileSystem", clobber=True)


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("a/lsun-{000000..000001}.tar", [ZERO, ONE]),
        ("a/lsun-{000001..000000}.tar", [ONE, ZERO]),
        ("a/lsun-{000000,000001}.tar", [ZERO, ONE]),
        ("{a/lsun-00000{0..1},b/x}.tar", [ZERO, ONE, OTHER]),
        ("b/x.tar::a/lsun-{000000..000001}.tar", [OTHER, ZERO, ONE]),
        ("a/${SET}.tar", [ZERO, ONE]),
        ("a/*.tar", [ZERO, ONE]),
        ("?/*", [ZERO, ONE, OTHER]),
        ("{b,a}/*.tar", [OTHER, ZERO, ONE]),
        ("[ab]/**/*.tar", [ZERO, ONE, OTHER]),
        ("a", [ZERO, ONE]),
        ("a/::{b,c/../ours}", [ZERO, ONE, OTHER, "c/../ours/0.tar"]),
        ("@c/list.txt", [f"c/../{name}" for name in (ZERO, ONE, OTHER)]),
        ("odd[1].tar::@c/list.txt", [ODD, *(f"c/../{name}" for name in (ZERO, ONE, OTHER))]),
        ("wids.json", [ZERO, ONE]),
        ("based.json", [ONE, f"HERE/{OTHER}"]),
        ("a/lsun-000000.tar", [ZERO]),
        (f"file://HERE/{ZERO}", [f"HERE/{ZERO}"]),
        ("odd[1].tar", [ODD]),
        ("ours/0.tar", ["ours/0.tar"]),
    ],
)
def test_every_notation_names_its_tars(folder: Path, spec: str, wanted: list[str]) -> None:
    spec = spec.replace("HERE", str(folder))
    assert expand(spec) == [name.replace("HERE", str(folder)) for name in wanted]
    assert is_specification(spec)


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("memory://bucket/train", ["memory://bucket/train/0.tar", "memory://bucket/train/1.tar"]),
        ("memory://bucket/*/0.tar", ["memory://bucket/train/0.tar", "memory://bucket/val/0.tar"]),
        ("memory://bucket/*/*", [f"memory://bucket/{n}.tar" for n in ("train/0", "train/1", "val/0")]),
        ("memory://bucket/{val,train}/*", [f"memory://bucket/{n}.tar" for n in ("val/0", "train/0", "train/1")]),
        ("@memory://bucket/list.txt", [*(f"memory://bucket/train/{n}.tar" for n in "01"), f"{HUB}/val/0.tar"]),
        (f"{HUB}/train", [f"{HUB}/train/{n}.tar" for n in "01"]),
        (f"{HUB}/t*/{{0..1}}.tar::{HUB}/val/0.tar", [f"{HUB}/{n}.tar" for n in ("train/0", "train/1", "val/0")]),
        ("https://host/a-{00..01}.tar?key=x", [f"https://host/a-{n}.tar?key=x" for n in ("00", "01")]),
        ("s3://bucket/{0..1}.tar", ["s3://bucket/0.tar", "s3://bucket/1.tar"]),
    ],
)
def test_every_notation_names_tars_in_stores(stores: None, spec: str, wanted: list[str]) -> None:
    assert expand(spec) == wanted
    assert is_specification(spec)


@pytest.mark.parametrize(
    ("spec", "kind", "said"),
    [
        ("pipe:cat a/{000000..000001}.tar", UsageError, "pipe: is refused, because it would run a shell command"),
        ("a::pipe:touch ran", UsageError, "pipe: is refused"),
        ("@pipe.txt", UsageError, "pipe: is refused"),
        ("pipe.json", UsageError, "pipe: is refused"),
        ("ftp://host/{0..1}.tar", UsageError, "URLs of kind 'ftp' are refused"),
        ("", UsageError, "an empty name among the tars"),
        ("a::", UsageError, "an empty name among the tars"),
        ("@zero.txt", UsageError, "a zero byte"),
        ("s-{0..1000000000000}.tar", UsageError, "names 1,000,000,000,001 tars; expected at most 1,000,000"),
        ("s-${MANY}.tar", UsageError, "names 1,000,000,000,001 tars"),
        ("{0..999999}{0..999999}.tar", UsageError, "names 1,000,000,000,000 tars"),
        ("{" * 5000 + "}" * 5000, UsageError, "more than 20 deep"),
        ("s-{0..%s}.tar" % ("9" * 5000), UsageError, "4300"),
        ("s-{0..3.tar", UsageError, "an opening brace without its closing one"),
        ("s-}0..3{.tar", UsageError, "a closing brace without its opening one"),
        ("${NONE}.tar", UsageError, "${NAME} is the value of WDS_NAME"),
        ("a/*.tar::a/lsun-000000.tar", UsageError, "names a/lsun-000000.tar twice"),
        ("memory://bucket/**/*.tar", UsageError, "** works on disks only"),
        ("@", UsageError, "expected @list.txt"),
        ("@nested.txt", UsageError, "neither lists nor variables"),
        ("@variable.txt", UsageError, "neither lists nor variables"),
        ("@empty.txt", DataError, "an empty list"),
        ("@binary.txt", DataError, "not a text file"),
        ("@gone.txt", DataError, "gone.txt: no such file"),
        ("@memory://bucket/local.txt", DataError, "a file from a store may name only URLs"),
        ("memory://bucket/local.json", DataError, "a file from a store may name only URLs"),
        ("no.json", DataError, "not JSON"),
        ("deep.json", DataError, "not JSON"),
        ("more.json", DataError, "refers to other data sets; name the index of each, joined by ::"),
        *((f"{name}.json", DataError, "no list of shards") for name in ("list", "none", "other", "holes")),
        ("a/lsun-{000000..000003}.tar", DataError, "names 4 tars, and 2 are missing"),
        ("nothing", DataError, "nothing: no such file; expected a tar, a folder of tars, braces"),
        ("a/x-*.tar", DataError, "matches nothing"),
        ("b/*.txt", DataError, "matches 1 files, none of them a .tar"),
        ("c", DataError, "c: no .tar files here"),
        ("memory://bucket/nowhere", DataError, "no .tar files here"),
    ],
)
def test_what_names_no_tars_is_refused_in_one_line(
    folder: Path, stores: None, spec: str, kind: type[UserError], said: str
) -> None:
    with pytest.raises(kind) as caught:
        expand(spec)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("pattern", PATTERNS.split())
def test_names_are_counted_as_the_library_makes_them(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(braceexpand(f"nowhere/{pattern}.tar"))
    monkeypatch.setattr(specification, "MOST_TARS", len(names))
    with pytest.raises(DataError) as caught:  # the first name is missing: all were made
        expand(f"nowhere/{pattern}.tar")
    assert str(caught.value).startswith(f"{names[0]}: no such file")
    monkeypatch.setattr(specification, "MOST_TARS", len(names) - 1)
    with pytest.raises(UsageError, match=f"names {len(names)} tars; expected at most {len(names) - 1}"):
        expand(f"nowhere/{pattern}.tar")


@pytest.mark.parametrize(
    "place", ["ours", "ours/", "ours/dataset.json", "c", "nothing", "memory://ours", "memory://no"]
)
def test_a_data_set_of_ours_or_nothing_is_no_specification(folder: Path, stores: None, place: str) -> None:
    assert not is_specification(place)
    assert is_dataset(place) == (place.rstrip("/").endswith("ours"))


def test_images_are_named_by_the_file_of_their_tar_and_by_its_path_where_two_share_it() -> None:
    assert short_names(["a/0.tar", "/b/1.tar", "s3://c/2.tar", "https://d/%C3%BC.tar?key=1"]) == [
        *("0.tar", "1.tar", "2.tar", "ü.tar"),
    ]
    assert short_names(["s3://b/x/a/0.tar", "s3://b/x/c/0.tar", "s3://b/x/1.tar"]) == ["a/0.tar", "c/0.tar", "1.tar"]
    assert len(set(short_names(["https://host/get.tar?id=1", "https://host/get.tar?id=2"]))) == 2
    assert short_names(["one.tar"]) == ["one.tar"]
