"""A tar that breaks is refused where it breaks: Python's tarfile ends quietly there, and all that follows is lost."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from picture_files import make_picture

from pipeline.common.imaging import encode
from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate

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
    members = {}
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


def test_of_two_files_with_one_name_the_last_counts(dcgan_data: Any, tmp_path: Path) -> None:
    """As when the tar is unpacked, and as `tar --append` and `--update` mean it; the picture before it is counted."""
    old, new, other = (encode(make_picture(index, 16, 16), "png") for index in range(3))
    (tmp_path / "src").mkdir()
    with tarfile.open(tmp_path / "src" / "0.tar", "w") as tar:
        for name, data in (
            ("a.png", old),
            ("a.json", b'{"age": 1}'),
            ("b.png", other),
            ("b.json", b'{"age": 3}'),
            ("a.png", new),
            ("a.json", b'{"age": 2}'),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    command = ["build", "webdataset", tmp_path / "src", tmp_path / "out", "--size", 16, "--encoding", "png"]
    refused = dcgan_data(*command)
    assert (refused.code, "0.tar/a.png: replaced by a later file of the same name in the tar" in refused.err) == (
        65,
        True,
    ), refused.err
    assert dcgan_data(*command, "--max-bad", 0.5).code == 0
    dataset = open_dataset(tmp_path / "out")
    assert dataset.refused.reasons == {"replaced by a later file of the same name in the tar": 1}
    images, columns = next(iterate(dataset, labels=True))
    found = zip(columns["key"], columns["age"], (image.tobytes() for image in images), strict=True)
    assert sorted(found) == [
        ("0.tar/a.png", 2, make_picture(1, 16, 16).tobytes()),
        ("0.tar/b.png", 3, make_picture(2, 16, 16).tobytes()),
    ]
