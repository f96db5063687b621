"""A tar that breaks is refused where it breaks: Python's tarfile ends quietly there, and all that follows is lost."""

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
import webdataset
from picture_files import make_picture, tree

from pipeline.common import storage
from pipeline.common.imaging import encode
from pipeline.common.storage import Store, locate, public_name
from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate
from pipeline.data.sources.tars import Tars

WNID = "n01440764"


def write_tar(path: Path, members: dict[str, bytes]) -> list[int]:
    """Write a tar of files; return where their headers stand, and last its end mark."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        return [*(member.offset for member in tar), tar.offset]


def pictures(count: int) -> dict[str, bytes]:
    return {f"{WNID}_{index:03d}.png": encode(make_picture(index, 16, 16), "png") for index in range(count)}


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


@pytest.fixture(params=["webdataset", "imagenet", "nested"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def source(folder: Path, kind: str, data: bytes) -> tuple[str, Path]:
    """Put a tar of 20 pictures where a source of this kind finds it; return the source and SRC."""
    folder.mkdir()
    if kind == "nested":
        write_tar(folder / "train.tar", {"n00000001.tar": empty_tar(), f"{WNID}.tar": data})
        return "imagenet", folder / "train.tar"
    (folder / f"{WNID}.tar").write_bytes(data)
    return kind, folder


def empty_tar() -> bytes:
    buffer = io.BytesIO()
    tarfile.open(fileobj=buffer, mode="w").close()
    return buffer.getvalue()


def test_a_header_that_cannot_be_read_is_not_the_end(dcgan_data: Any, tmp_path: Path, kind: str) -> None:
    headers = write_tar(tmp_path / "whole.tar", pictures(20))
    data = (tmp_path / "whole.tar").read_bytes()
    damages = {
        "flipped": (flip(data, headers[7] + 3), headers[7]),
        "zeroed": (data[: headers[7]] + bytes(512) + data[headers[7] + 512 :], headers[7]),
        "cut in a header": (data[: headers[7] + 100], headers[7]),
        "two tars in one file": (data + data, headers[20]),
    }
    for number, (name, (damaged, offset)) in enumerate(damages.items()):
        what, src = source(tmp_path / f"src{number}", kind, damaged)
        done = dcgan_data("build", what, src, tmp_path / f"out{number}", "--size", 16, "--workers", 1)
        assert done.code == 65, (name, done.out)
        assert f"{WNID}.tar: damaged tar: at offset {offset} is neither" in done.err, name
        assert not (tmp_path / f"out{number}" / "dataset.json").exists()


def test_a_tar_that_ends_inside_a_member_is_refused(dcgan_data: Any, tmp_path: Path, kind: str) -> None:
    headers = write_tar(tmp_path / "whole.tar", pictures(20))
    what, src = source(tmp_path / "src", kind, (tmp_path / "whole.tar").read_bytes()[: headers[7] + 600])
    done = dcgan_data("build", what, src, tmp_path / "out", "--size", 16, "--workers", 1)
    assert done.code == 65
    assert f"{WNID}.tar: damaged tar near offset" in done.err


def test_a_tar_without_its_end_is_taken_only_when_the_user_says_so(dcgan_data: Any, tmp_path: Path, kind: str) -> None:
    """Some writers leave the end mark away; a copy cut off between two members looks the same."""
    headers = write_tar(tmp_path / "whole.tar", pictures(20))
    what, src = source(tmp_path / "src", kind, (tmp_path / "whole.tar").read_bytes()[: headers[7]])
    command = ["build", what, src, tmp_path / "out", "--size", 16, "--workers", 1]
    first = dcgan_data(*command)
    assert first.code == 65
    assert "tar without an end mark, perhaps cut off" in first.err
    assert f"{WNID}.tar" in first.err
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert dcgan_data(*command, "--max-bad", 0.2).code == 0
    dataset = open_dataset(tmp_path / "out")
    assert (dataset.images, dataset.refused.count) == (7, 1)


def test_tars_of_img2dataset(dcgan_data: Any, tmp_path: Path) -> None:
    """Each of its .json has a `key`, which no label can be called and nobody can rename."""
    members = {"__notes__/of-all.jpg": b"not an image of the set"}
    for index in range(6):
        name = f"{index:09d}"
        members[f"{name}.jpg"] = encode(make_picture(index, 32, 32), "jpg")
        members[f"{name}.txt"] = b"a caption"
        columns = {"caption": "a caption", "url": f"http://x/{index}", "key": name, "status": "success", "width": 32}
        members[f"{name}.json"] = json.dumps(columns | {"error_message": None, "exif": "{}"}).encode()
    (tmp_path / "src").mkdir()
    write_tar(tmp_path / "src" / "00000.tar", members)
    done = dcgan_data("build", "webdataset", tmp_path / "src", tmp_path / "out", "--size", 16)
    assert done.code == 0, done.err
    assert "note: the label 'key' was skipped" in done.err
    assert open_dataset(tmp_path / "out").labels == {
        "caption": "str",
        "exif": "str",
        "status": "str",
        "url": "str",
        "width": "int",
    }
    _, read = next(iterate(open_dataset(tmp_path / "out"), labels=True))
    assert sorted(read["key"]) == [f"00000.tar/{index:09d}.jpg" for index in range(6)]
    assert all(int(key[10:19]) == int(url[-1]) for key, url in zip(read["key"], read["url"], strict=True))


def test_json_that_cannot_be_read_gives_no_labels_and_is_counted(dcgan_data: Any, tmp_path: Path) -> None:
    picture = encode(make_picture(0, 16, 16), "png")
    members = {"a.png": picture, "a.json": b"[" * 200_000, "b.png": picture, "b.json": b"{", "c.png": picture}
    (tmp_path / "src").mkdir()
    write_tar(tmp_path / "src" / "0.tar", {**members, "c.json": b'{"age": 3}'})
    done = dcgan_data("build", "webdataset", tmp_path / "src", tmp_path / "out", "--size", 16)
    assert done.code == 0, done.err
    assert "note: 2 .json members of 0.tar are not JSON and give no labels" in done.err
    _, columns = next(iterate(open_dataset(tmp_path / "out"), labels=True))
    assert dict(zip(columns["key"], columns["age"], strict=True)) == {
        "0.tar/a.png": None,
        "0.tar/b.png": None,
        "0.tar/c.png": 3,
    }


@pytest.fixture
def lsun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A working folder with two tars that the library's writer made; return their names."""
    monkeypatch.chdir(tmp_path)
    names = [f"tars/lsun-{number:06d}.tar" for number in range(2)]
    Path("tars").mkdir()
    for number, name in enumerate(names):
        with Path(name).open("wb") as file, webdataset.TarWriter(file) as writer:
            for index in range(4):
                picture = encode(make_picture(10 * number + index, 20, 16), "png")
                writer.write({"__key__": f"{index:04d}", "png": picture, "cls": number})
    Path("list.txt").write_text("\n".join(names))
    Path("wids.json").write_text(json.dumps({"shardlist": [{"url": name, "nsamples": 4} for name in names]}))
    return names


def test_every_notation_builds_the_same_set(dcgan_data: Any, tmp_path: Path, lsun: list[str]) -> None:
    for name in lsun:
        fsspec.filesystem("memory").pipe(f"/bucket/{name}", Path(name).read_bytes())
    specs = [
        *("tars", "tars/lsun-{000000..000001}.tar", "tars/lsun-*.tar", "::".join(lsun), "tars/lsun-00000{0,1}.tar"),
        *("@list.txt", "wids.json", f"file://{tmp_path}/tars", "memory://bucket/tars", "memory://bucket/tars/*.tar"),
        *("memory://bucket/tars/lsun-000000.tar::tars/lsun-000001.tar", "index"),
    ]
    assert dcgan_data("index", "tars", "index", "--size", 16, "--workers", 1).code == 0
    made = {}
    for number, spec in enumerate(specs):
        done = dcgan_data("build", "webdataset", spec, f"out{number}", "--size", 16, "--workers", 1)
        assert done.code == 0, (spec, done.err)
        made[spec] = tree(tmp_path / f"out{number}")
        assert json.loads(made[spec].pop("dataset.json"))["source"]["location"] == public_name(spec)
    assert all(files == made["tars"] for files in made.values()), "the same names, bytes and labels"
    dataset = open_dataset("out0")
    assert (dataset.images, dataset.labels) == (8, {"label": "int"})


def test_tars_of_one_file_name_in_two_folders_are_told_apart(dcgan_data: Any, tmp_path: Path, lsun: list[str]) -> None:
    for number, name in enumerate(lsun):
        (tmp_path / f"part{number}").mkdir()
        Path(name).rename(tmp_path / f"part{number}" / "0.tar")
    done = dcgan_data("build", "webdataset", "part{0..1}/0.tar", "out", "--size", 16, "--workers", 1)
    assert done.code == 0, done.err
    _, columns = next(iterate(open_dataset("out"), labels=True))
    assert sorted(zip(columns["key"], columns["label"], strict=True)) == [
        (f"part{number}/0.tar/{index:04d}.png", number) for number in range(2) for index in range(4)
    ]


@pytest.mark.parametrize("spec", ["@list.txt", "wids.json", "copy.tar::tars/lsun-000001.tar"])
def test_an_out_that_holds_one_of_the_tars_is_refused(dcgan_data: Any, lsun: list[str], spec: str) -> None:
    Path("copy.tar").write_bytes(Path(lsun[0]).read_bytes())
    done = dcgan_data("build", "webdataset", spec, "tars", "--overwrite", "--size", 16)
    assert done.code == 2
    assert "the build would delete it" in done.err
    assert all(Path(name).exists() for name in lsun)


@pytest.mark.parametrize("name", ["s.tar.gz", "s.tar"])
def test_a_compressed_tar_is_told_by_its_first_bytes_and_unpacked(dcgan_data: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "src").mkdir()
    write_tar(tmp_path / "plain.tar", {**pictures(3), f"{WNID}_001.cls": b"7"})
    data = gzip.compress((tmp_path / "plain.tar").read_bytes())
    (tmp_path / "src" / name).write_bytes(data)
    for number, src in enumerate((tmp_path / "src", tmp_path / "src" / name)):
        out = tmp_path / f"out{number}"
        done = dcgan_data("build", "webdataset", src, out, "--size", 16, "--workers", 1)
        assert done.code == 0, done.err
        images, columns = next(iterate(open_dataset(out), labels=True))
        assert sorted(columns["key"]) == [f"{name}/{picture}" for picture in pictures(3)]
        at = columns["key"].index(f"{name}/{WNID}_001.png")
        assert columns["label"][at] == 7
        assert (images[at] == make_picture(1, 16, 16)).all()
    (tmp_path / "src" / name).write_bytes(data[:-40])
    done = dcgan_data("build", "webdataset", tmp_path / "src", tmp_path / "cut", "--size", 16)
    assert (done.code, f"{name} (gzip): damaged, or cut off" in done.err) == (65, True), done.err


def test_a_name_that_is_in_a_tar_twice_counts_once(dcgan_data: Any, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with tarfile.open(tmp_path / "src" / "0.tar", "w") as tar:
        for seed, name in enumerate(("a.png", "b.png", "a.png", "./a.png")):
            data = encode(make_picture(seed, 16, 16), "png")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    command = ["build", "webdataset", tmp_path / "src", tmp_path / "out", "--size", 16, "--workers", 1]
    assert "0.tar/a.png: its name is in its tar twice" in dcgan_data(*command).err
    assert dcgan_data(*command, "--max-bad", 0.5).code == 0
    dataset = open_dataset(tmp_path / "out")
    assert (dataset.images, dataset.refused.count) == (3, 1)
    images, columns = next(iterate(dataset, labels=True))
    assert (images[columns["key"].index("0.tar/a.png")] == make_picture(0, 16, 16)).all()


def test_a_tar_that_lies_about_sizes_is_refused_and_never_loops(dcgan_data: Any, tmp_path: Path) -> None:
    """A member of negative size leads back to itself; a sparse file has fewer bytes in the tar than its size."""
    (tmp_path / "src").mkdir()
    headers = write_tar(tmp_path / "src" / "0.tar", pictures(3))
    data = bytearray((tmp_path / "src" / "0.tar").read_bytes())
    header = memoryview(data)[headers[1] : headers[1] + 512]
    for size, kind, said in ((-512, b"0", "0.tar: damaged tar near offset"), (600, b"S", "0.png: a sparse file")):
        header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
        header[156:157] = kind
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "src" / "0.tar").write_bytes(data)
        done = dcgan_data("build", "webdataset", tmp_path / "src", tmp_path / "out", "--size", 16, "--workers", 1)
        assert done.code == 65
        assert said in done.err.replace(f"{WNID}_001", "0")


def test_a_tar_is_opened_once_for_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, pictures(4))
    source = Tars(str(tmp_path))
    listing = source.listing()
    opened: list[str] = []

    def counted(tar: str) -> tuple[Store, str]:
        opened.append(tar)
        return locate(tar)

    monkeypatch.setattr(storage, "locate", counted)
    first = [source.read(item) for item in listing.items]
    assert len(first) == 8
    assert sorted(opened) == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    assert [pickle.loads(pickle.dumps(source)).read(item) for item in listing.items] == first


def test_a_tar_that_was_replaced_is_opened_again(tmp_path: Path) -> None:
    expected = {f"a.tar/{name}": data for name, data in pictures(4).items()}
    write_tar(tmp_path / "a.tar", pictures(4))
    source = Tars(str(tmp_path))
    assert {item.key: source.read(item) for item in source.listing().items} == expected
    write_tar(tmp_path / "b", dict(reversed(pictures(4).items())))
    (tmp_path / "b").replace(tmp_path / "a.tar")
    assert {item.key: source.read(item) for item in source.listing().items} == expected
