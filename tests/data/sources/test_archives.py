"""An archive is a folder: zips, tars and compressed tars give the data set of the pictures unpacked."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_files import as_bytes, make_folder, make_picture, tree
from PIL import Image
from storage_servers import python_server

from pipeline.common.errors import DataError
from pipeline.common.imaging import BadImage, encode
from pipeline.common.pictures import formats
from pipeline.data.build.plan import Selection, select
from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate
from pipeline.data.sources import places
from pipeline.data.sources.archives import files as archive_files
from pipeline.data.sources.folder import Folder
from pipeline.data.sources.interface import Item, Items, Listing

SMALL = ("--size", 16, "--workers", 1)


def contents(location: Path | str, **options: Any) -> dict[str, tuple[bytes, tuple[Any, ...]]]:
    """Return {key: (bytes, labels)} of what a folder or archive holds."""
    source = Folder(str(location), **options)
    listing = source.listing()
    return {item.key: (source.read(item), item.labels) for item in listing.items}


def zipped(path: Path, folder: Path, method: int = zipfile.ZIP_DEFLATED, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            archive.write(file, prefix + str(file.relative_to(folder)))
    return path


def tarred(path: Path, folder: Path, mode: str) -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        tar.add(folder, ".")
    return path


def zst(path: Path, folder: Path) -> Path:
    compress = pytest.importorskip("backports.zstd", reason="of the extra zstd; Python 3.14 needs none").compress
    plain = tarred(path.with_suffix(""), folder, "w")
    path.write_bytes(compress(plain.read_bytes()))
    plain.unlink()
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "pics", 6, classes=("cat", "dog"))


FORMS: dict[str, Callable[[Path, Path], Path]] = {
    "stored.zip": lambda path, folder: zipped(path, folder, zipfile.ZIP_STORED),
    "deflated.zip": zipped,
    "bzip2.zip": lambda path, folder: zipped(path, folder, zipfile.ZIP_BZIP2),
    "lzma.zip": lambda path, folder: zipped(path, folder, zipfile.ZIP_LZMA),
    "wrapped.zip": lambda path, folder: zipped(path, folder, prefix="a/b/"),
    "a.tar": lambda path, folder: tarred(path, folder, "w"),
    "a.tar.gz": lambda path, folder: tarred(path, folder, "w:gz"),
    "a.tar.bz2": lambda path, folder: tarred(path, folder, "w:bz2"),
    "a.tar.xz": lambda path, folder: tarred(path, folder, "w:xz"),
    "a.tar.zst": zst,
    "misnamed.tar": lambda path, folder: tarred(path, folder, "w:gz"),
    "no-suffix": zipped,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_archive_holds_the_files_of_the_folder(tmp_path: Path, folder: Path, form: str) -> None:
    assert contents(FORMS[form](tmp_path / form, folder)) == contents(folder)


def test_a_zip_builds_the_bytes_of_its_folder(dcgan_data: Any, tmp_path: Path, folder: Path) -> None:
    zipped(tmp_path / "pics.zip", folder)
    assert dcgan_data("build", "folder", folder, tmp_path / "near", *SMALL).code == 0
    done = dcgan_data("build", "folder", tmp_path / "pics.zip", tmp_path / "out", *SMALL)
    assert done.code == 0, done.err
    near, far = tree(tmp_path / "near"), tree(tmp_path / "out")
    described = [json.loads(files.pop("dataset.json")) for files in (near, far)]
    assert near == far
    assert [one["source"].pop("location") for one in described] == ["pics", "pics.zip"]
    assert described[0] == described[1]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_in_an_archive_or_a_folder_are_folders(tmp_path: Path, method: int) -> None:
    (tmp_path / "kaggle").mkdir()
    for name in ("cat", "dog"):
        make_folder(tmp_path / name, 2)
    zipped(tmp_path / "kaggle" / "cat.zip", tmp_path / "cat", method)
    tarred(tmp_path / "kaggle" / "dog.tar.gz", tmp_path / "dog", "w:gz")
    (tmp_path / "kaggle" / "readme.md").write_text("from Kaggle")
    expected = {f"{name}/{path.name}": name for name in ("cat", "dog") for path in (tmp_path / name).iterdir()}
    for place in (tmp_path / "kaggle", zipped(tmp_path / "archive.zip", tmp_path / "kaggle", method)):
        found = contents(place)
        assert {key: labels for key, (_, labels) in found.items()} == {k: (v,) for k, v in expected.items()}
        assert all(data == (tmp_path / key).read_bytes() for key, (data, _) in found.items())


def test_a_zip64_is_read(tmp_path: Path, folder: Path) -> None:
    with zipfile.ZipFile(tmp_path / "big.zip", "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            with archive.open(str(file.relative_to(folder)), "w", force_zip64=True) as target:
                target.write(file.read_bytes())
    assert contents(tmp_path / "big.zip") == contents(folder)


def test_archives_are_read_over_http(tmp_path: Path, folder: Path) -> None:
    zipped(tmp_path / "pics.zip", folder)
    tarred(tmp_path / "pics.tar.gz", folder, "w:gz")
    with python_server(tmp_path) as port:
        for name in ("pics.zip", "pics.tar.gz"):
            assert contents(f"http://127.0.0.1:{port}/{name}") == contents(folder)


def test_celeba_is_read_from_its_zip(dcgan_data: Any, tmp_path: Path) -> None:
    pictures = tmp_path / "img_align_celeba"
    pictures.mkdir()
    for index in range(4):
        (pictures / f"{index + 1:06d}.jpg").write_bytes(encode(make_picture(index, 178, 218), "jpg"))
    lists = {
        "Anno/list_attr_celeba.txt": "4\nMale\n" + "".join(f"{i + 1:06d}.jpg {1 - i % 2 * 2:2d}\n" for i in range(4))
    }
    authors, kaggle = tmp_path / "CelebA", tmp_path / "kaggle"
    for place, files in ((authors, lists), (kaggle, {"list_attr_celeba.txt": next(iter(lists.values()))})):
        for name, text in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text)
    (authors / "Img").mkdir()
    zipped(authors / "Img" / "img_align_celeba.zip", pictures, prefix="img_align_celeba/")
    zipped(kaggle / "img_align_celeba.zip", pictures, prefix="img_align_celeba/")
    zipped(tmp_path / "archive.zip", kaggle)
    prints = set()
    for number, src in enumerate((authors, kaggle, kaggle / "img_align_celeba.zip", tmp_path / "archive.zip")):
        done = dcgan_data("build", "celeba", src, tmp_path / f"out{number}", *SMALL)
        assert done.code == 0, (src, done.err)
        prints.add(open_dataset(tmp_path / f"out{number}").fingerprint())
    assert len(prints) == 1
    _, columns = next(iterate(open_dataset(tmp_path / "out0"), labels=True))
    assert dict(zip(columns["key"], columns["male"], strict=True))["000002.jpg"] is False


def test_a_bomb_is_refused_before_it_fills_the_disk(
    dcgan_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_files, "FREE_BYTES", 1 << 16)
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("zeros.png")
        info.size = 4 << 20
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    done = dcgan_data("build", "folder", tmp_path / "bomb.tar.gz", tmp_path / "out")
    assert (done.code, "unpacks to more than 200 times its size" in done.err) == (65, True), done.err


def test_what_a_zip_says_of_itself_is_checked(tmp_path: Path, folder: Path) -> None:
    path = zipped(tmp_path / "pics.zip", folder, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 9] ^= 1
    path.write_bytes(data)
    source = Folder(str(path))
    listing = source.listing()
    assert len(listing.items) == 6
    first = min(listing.items, key=lambda item: item.where.offset)
    with pytest.raises(BadImage, match=r"damaged zip \(checksum\)"):
        source.read(first)
    assert all(source.read(item) for item in listing.items if item.key != first.key)


def test_members_that_cannot_be_read_are_refused_by_name(tmp_path: Path, folder: Path) -> None:
    path = zipped(tmp_path / "pics.zip", folder)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1  # encrypted
    path.write_bytes(data)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("dog/0001.png", b"again")
    listing = Folder(str(path)).listing()
    assert sorted(listing.refused.entries) == [
        ("cat/0000.png", "encrypted"),
        ("dog/0001.png", "its name is in its archive twice"),
    ]


def test_a_damaged_archive_is_one_line(dcgan_data: Any, tmp_path: Path, folder: Path) -> None:
    for name in ("pics.zip", "pics.tar.gz"):
        path = zipped(tmp_path / name, folder) if name == "pics.zip" else tarred(tmp_path / name, folder, "w:gz")
        path.write_bytes(path.read_bytes()[:-60])
        done = dcgan_data("build", "folder", path, tmp_path / "out")
        assert (done.code, "damaged" in done.err) == (65, True), done.err
        assert len(done.err.strip().splitlines()) == 2


def test_a_file_that_is_no_archive_is_refused_by_what_it_is(dcgan_data: Any, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.zip").write_text("hello")
    done = dcgan_data("build", "folder", tmp_path / "a.zip", tmp_path / "out")
    assert (done.code, "a.zip: neither a zip nor a tar" in done.err) == (65, True), done.err
    done = dcgan_data("build", "folder", folder / "cat" / "0000.png", tmp_path / "out")
    assert (done.code, "0000.png: one picture (PNG)" in done.err) == (2, True), done.err


def test_content_comes_before_the_suffix_and_the_rest_is_counted(dcgan_data: Any, tmp_path: Path) -> None:
    src = tmp_path / "src"
    for place in ("@eaDir", "lost+found", "$RECYCLE.BIN", ".ipynb_checkpoints"):
        make_folder(src / place, 1)
    picture = Image.fromarray(make_picture(1, 20, 20))
    (src / "no-suffix").write_bytes(as_bytes(picture, "PNG"))
    (src / "wrong.txt").write_bytes(as_bytes(picture, "WEBP"))
    (src / "a.jpe").write_bytes(as_bytes(picture, "JPEG"))
    (src / "b.txt").write_text("hello")
    (src / "c.csv").write_text("x,y\n")
    expected = {"no-suffix", "wrong.txt", "a.jpe"}
    for kind, name in (("AVIF", "d.avif"), ("JPEG2000", "e.jp2")):
        if formats.is_enabled(kind):
            (src / name).write_bytes(as_bytes(picture, kind))
            expected.add(name)
    done = dcgan_data("build", "folder", src, tmp_path / "out", *SMALL)
    assert done.code == 0, done.err
    images, columns = next(iterate(open_dataset(tmp_path / "out"), labels=True))
    assert set(columns["key"]) == expected
    assert np.abs(images.astype(int) - images[columns["key"].index("no-suffix")]).mean() < 20
    note = next(line for line in done.err.splitlines() if "passed over" in line)
    for words in ("1 folder @eaDir", "1 folder lost+found", "1 folder $RECYCLE.BIN", "1 .txt", "1 .csv"):
        assert words in note


def test_the_package_for_a_format_is_named(dcgan_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src").mkdir()
    for number in range(3):
        (tmp_path / "src" / f"{number}.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    monkeypatch.setattr(places, "picture_suffixes", lambda: frozenset({".png"}))
    monkeypatch.setattr(places, "missing_format", {".heic": "HEIF"}.get)
    alone = dcgan_data("build", "folder", tmp_path / "src", tmp_path / "out")
    assert (alone.code, "3 pictures, but they are .heic (pip install 'dcgan-pipeline[heif]'" in alone.err) == (69, True)
    (tmp_path / "src" / "a.png").write_bytes(encode(make_picture(1), "png"))
    done = dcgan_data("build", "folder", tmp_path / "src", tmp_path / "out", *SMALL)
    assert (done.code, "passed over: 3 .heic (pip install 'dcgan-pipeline[heif]'" in done.err) == (0, True), done.err


METADATA = {
    "csv": "file_name,age,name\n0000.png,3,Zoë\nsub/0001.png,4,B\nnone.png,5,C\n",
    "jsonl": "".join(
        json.dumps({"age": age, "file_name": name, "name": text, "boxes": [[1, 2]]}) + "\n"
        for name, age, text in (("0000.png", 3, "Zoë"), ("sub/0001.png", 4, "B"), ("none.png", 5, "C"))
    ),
}


@pytest.mark.parametrize("form", METADATA)
@pytest.mark.parametrize("packed", [False, True])
def test_metadata_beside_the_pictures_gives_their_labels(tmp_path: Path, form: str, packed: bool) -> None:
    src = tmp_path / "src"
    make_folder(src / "train", 1)
    (src / "train" / "sub").mkdir()
    for name in ("train/sub/0001.png", "train/0002.png", "test/0000.png"):
        (src / name).parent.mkdir(exist_ok=True)
        (src / name).write_bytes(encode(make_picture(1), "png"))
    (src / "train" / f"metadata.{form}").write_text(METADATA[form])
    location = zipped(tmp_path / "src.zip", src) if packed else src
    listing = Folder(str(location)).listing()
    assert listing.labels == {"class": "str", "age": "int", "name": "str"}
    assert {item.key: item.labels for item in listing.items} == {
        "train/0000.png": ("train", 3, "Zoë"),
        "train/sub/0001.png": ("train", 4, "B"),
        "train/0002.png": ("train", None, None),
        "test/0000.png": ("test", None, None),
    }
    assert any("1 rows of train/metadata" in note for note in listing.notes)
    assert any("boxes" in note for note in listing.notes) == (form == "jsonl")
    assert Folder(str(location), "folders").listing().labels == {"class": "str"}


def test_json_lines_are_a_table_of_labels(dcgan_data: Any, tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", 3)
    lines = [{"file_name": f"{index:04d}.png", "male": index == 1} for index in range(3)]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["build", "folder", src, tmp_path / "out", *SMALL, "--labels", tmp_path / "labels.jsonl"]
    done = dcgan_data(*command)
    assert done.code == 0, done.err
    _, columns = next(iterate(open_dataset(tmp_path / "out"), labels=True))
    assert dict(zip(columns["key"], columns["male"], strict=True))["0001.png"] is True
    for text, words in (
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 is no object"),
        ('{"a": 1}', "no rows with a column"),
    ):
        (tmp_path / "labels.jsonl").write_text(text)
        done = dcgan_data(*command, "--overwrite")
        assert (done.code, words in done.err) == (65, True), done.err


def test_a_parquet_is_a_table_of_labels(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow, of the extra parquet, is not installed")
    import pyarrow.parquet as pq

    src = make_folder(tmp_path / "src", 2)
    columns = {"age": [3, None], "image": [{"path": f"{index:04d}.png"} for index in range(2)], "boxes": [[1], []]}
    pq.write_table(pa.table(columns), src / "metadata.parquet")
    listing = Folder(str(src)).listing()
    assert listing.labels == {"age": "int"}
    assert {item.key: item.labels for item in listing.items} == {"0000.png": (3,), "0001.png": (None,)}
    (src / "metadata.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="not a parquet file"):
        Folder(str(src)).listing()


def test_two_pictures_of_one_key_are_said_and_the_first_is_kept() -> None:
    listing = Listing({}, Items([Item("a", (), 1), Item("b", (), 2), Item("a", (), 3)]))
    for _ in range(2):  # as for a training and a validation set
        assert {item.key: item.where for item in select(listing, Selection(seed=0))} == {"a": 1, "b": 2}
    assert listing.refused.entries == [("a", "its name is in SRC twice")]


def test_a_zip_that_lists_fewer_files_than_it_states_is_damaged(dcgan_data: Any, tmp_path: Path, folder: Path) -> None:
    data = bytearray(zipped(tmp_path / "a.zip", folder).read_bytes())
    count = data.rindex(b"PK\5\6") + 10
    data[count] += 2
    (tmp_path / "a.zip").write_bytes(data)
    done = dcgan_data("build", "folder", tmp_path / "a.zip", tmp_path / "out", *SMALL)
    assert (done.code, "lost in a damaged zip, which states 8 files" in done.err) == (65, True), done.err
    done = dcgan_data("build", "folder", tmp_path / "a.zip", tmp_path / "out", *SMALL, "--max-bad", 0.5)
    assert (done.code, open_dataset(tmp_path / "out").images) == (0, 6), done.err
