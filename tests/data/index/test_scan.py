"""A scan of a tar finds what Python's own reader finds, however the tar is written and read; damage has a name."""

import gzip
import os
import random
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from picture_files import as_bytes, make_picture
from PIL import Image
from tar_making import PACES, PICTURES, Files, Found, Member, MemoryTar, by_tarfile, make_tar, samples, suffix_of

from pipeline.common.errors import DataError
from pipeline.common.imaging import BadImage, open_image
from pipeline.common.storage import locate
from pipeline.data.dataset import Shard
from pipeline.data.index import scan as scanning
from pipeline.data.index.image_size import image_sizes, size_of
from pipeline.data.index.reader import DISK, Pace, opened
from pipeline.data.index.samples import index_tar
from pipeline.data.index.scan import Ending, scan, verify_headers
from pipeline.data.sources.interface import printable

TOO_SHORT = 30
"""Bytes of an image that are never enough to tell its size."""
LONG = "a-folder-of-a-long-name/" * 8 + "0001.jpg"


def files(data: bytes, pace: Pace = DISK) -> tuple[Found, Ending]:
    found, ending = scan(MemoryTar(data, pace), Files)
    return found.found, ending


def pieces() -> list[Member]:
    """Return files of many sizes, from none to more than a window."""
    rng = random.Random(3)
    return [(f"{i:04d}.jpg", rng.randbytes(size)) for i, size in enumerate([0, 1, 511, 512, 513, 3000, 9000, 40] * 4)]


@pytest.fixture(params=list(PACES.values()), ids=list(PACES))
def pace(request: pytest.FixtureRequest) -> Pace:
    pace: Pace = request.param
    return pace


USUAL = {
    "ustar": make_tar(pieces(), tarfile.USTAR_FORMAT),
    "gnu": make_tar(pieces(), tarfile.GNU_FORMAT),
    "pax": make_tar(pieces(), mtime=1.25),  # as webdataset's writer: attributes before every file
    "pax, long names": make_tar([*pieces(), (LONG, b"1"), ("ä.jpg", b"2"), *samples(3)], mtime=1.25),
    "gnu, long names": make_tar([*pieces(), (LONG, b"1"), *samples(3)], tarfile.GNU_FORMAT),
    "ustar, prefixes": make_tar([*pieces(), (LONG, b"1"), *samples(3)], tarfile.USTAR_FORMAT),
    "folders": make_tar([("a", b"")], type=tarfile.DIRTYPE)[:512] + make_tar([("a/b.jpg", b"1"), *samples(2)]),
}


@pytest.mark.parametrize("name", USUAL)
def test_usual_tars_are_read_as_tarfile_reads_them(name: str, pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "_with_tarfile", lambda *_: pytest.fail("left to tarfile"))
    data = USUAL[name]
    found, ending = files(data, pace)
    assert found == by_tarfile(data)
    assert ending.damage is None


def patched(data: bytes, place: int, field: bytes) -> bytes:
    """Return a tar with bytes of its first header replaced, and the checksum made right."""
    header = bytearray(data[:512])
    header[place : place + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


def with_attributes(content: bytes) -> bytes:
    """Return a tar whose second file has attributes."""
    attributes = make_tar([("x", content)], tarfile.USTAR_FORMAT)
    first, second = (make_tar([(name, b"z" * 700)], tarfile.USTAR_FORMAT) for name in ("a.jpg", "b.jpg"))
    return first[:1536] + patched(attributes, 156, b"x")[:1024] + second


def record(text: str) -> bytes:
    """Return an attribute as PAX writes it."""
    length = len(text) + 2
    while len(f"{length} {text}\n") != length:
        length += 1
    return f"{length} {text}\n".encode()


PLAIN = make_tar([("a.jpg", b"x" * 700), ("b.jpg", b"y")], tarfile.USTAR_FORMAT)
UNUSUAL = {
    "a hard link": patched(make_tar([("a.jpg", b"")]), 156, b"1"),
    "a symbolic link": patched(make_tar([("a.jpg", b"")]), 156, b"2"),
    "a size in binary": patched(PLAIN, 124, b"\x80" + bytes(9) + (700).to_bytes(2, "big")),
    "a size with blanks": patched(PLAIN, 124, b"      1274 \0"),
    "a size of twelve digits": patched(PLAIN, 124, b"000000001274"),
    "a folder in the oldest notation": patched(make_tar([("a/", b"")]), 156, b"\0"),
    "a size in the attributes": with_attributes(record("size=700")),
    "a name in other letters": with_attributes(record("hdrcharset=BINARY") + record("path=c.jpg")),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_tars_are_left_to_tarfile(name: str, pace: Pace) -> None:
    data = UNUSUAL[name]
    expected = by_tarfile(data)
    assert expected is not None
    assert files(data, pace) == (expected, Ending(files(data)[1].sha256, None))


@pytest.mark.parametrize("options", [["--format=gnu"], ["--format=pax"], ["--format=pax", "--sparse-version=0.1"]])
def test_sparse_files_are_known_as_such(tmp_path: Path, options: list[str], pace: Pace) -> None:
    with (tmp_path / "holes.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"data")
    (tmp_path / "whole.jpg").write_bytes(PICTURES[0])
    command = ["tar", "--sparse", *options, "-cf", "out.tar", "holes.jpg", "whole.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    data = (tmp_path / "out.tar").read_bytes()
    found, ending = scan(MemoryTar(data, pace), Files)
    assert found.found == by_tarfile(data)
    assert (found.sparse, ending.damage) == (["holes.jpg"], None)
    indexed = index_tar(MemoryTar(data, pace), "out.tar", min_side=1)
    assert indexed.key.slice(0, 9) == ["out.tar/whole.jpg"]
    assert indexed.refused == [("out.tar/holes.jpg", "a sparse file")]


def test_only_headers_are_read_where_images_are_large() -> None:
    data = make_tar([(f"{i}.jpg", bytes(1 << 20)) for i in range(64)], tarfile.USTAR_FORMAT)
    tar = MemoryTar(data, DISK)
    found, _ = scan(tar, Files)
    assert len(found.found) == 64
    assert sum(tar.reads) < len(data) // 2  # it begins with blocks, until it knows better


DAMAGED = {
    "": "empty",
    "gzip": "compressed with gzip",
    "html": "HTML",
    "random": "at offset 0 is neither a header nor the end",
    "cut in a file": "ends inside 0004.jpg",
    "cut in a header": "at offset 5120 is neither",
    "cut between files": "no end mark",
    "flipped": "at offset 5120 is neither",
    "a hole": "at offset 5120 is neither",
    "two tars": "neither a header nor the end",
    "a negative size": "negative size",
}


def damaged(name: str) -> bytes:
    data = USUAL["ustar"]
    flipped = bytearray(data)
    flipped[5120 + 3] ^= 4
    return {
        "": b"",
        "gzip": gzip.compress(data),
        "html": b"<!DOCTYPE html><html>Not Found</html>",
        "random": random.Random(1).randbytes(20_000),
        "cut in a file": data[:4100],
        "cut in a header": data[: 5120 + 100],
        "cut between files": data[:5120],
        "flipped": bytes(flipped),
        "a hole": data[:5120] + bytes(512) + data[5120 + 512 :],
        "two tars": data + data,
        "a negative size": patched(PLAIN, 124, b"\xff" * 10 + b"\xf0\x00"),
    }[name]


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_has_a_name_and_what_precedes_it_is_found(name: str, pace: Pace) -> None:
    found, ending = files(damaged(name), pace)
    assert ending.damage is not None
    assert DAMAGED[name] in ending.damage
    whole = by_tarfile(USUAL["ustar"]) or []
    assert found == whole[: len(found)]
    if name in ("cut in a header", "cut between files", "flipped", "a hole"):
        assert len(found) == len([offset for _, offset, _ in whole if offset < 5120])


def test_a_change_of_the_headers_is_seen_and_one_of_the_pixels_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        with open(path, "rb", buffering=0) as file:
            verify_headers(file, shard, "s3://bucket/a.tar")

    before = make_tar(samples(5), mtime=1.5)
    shard = Shard(name="a.tar", images=5, bytes=len(before), sha256=files(before)[1].sha256, offsets=[], sizes=[])
    check(before)
    check(before.replace(PICTURES[0][40:60], bytes(20)))
    for after in (make_tar(samples(5), mtime=2.5), before[:-512], make_tar(samples(5)[::-1], mtime=1.5)):
        with pytest.raises(DataError, match=r"s3://bucket/a\.tar: changed since it was indexed"):
            check(after)


def test_a_pipe_is_no_tar_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match="is no plain file"), opened(*locate(str(tmp_path / "a.tar"))):
        pass


def exif_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "x" * 40_000
    return as_bytes(Image.fromarray(make_picture(1, 51, 33)), "JPEG", exif=exif.tobytes())


IMAGES = {
    kind: as_bytes(Image.fromarray(make_picture(1, 51, 33)), kind)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
} | {
    "progressive": as_bytes(Image.fromarray(make_picture(1, 51, 33)), "JPEG", progressive=True),
    "lossless": as_bytes(Image.fromarray(make_picture(1, 51, 33)), "WEBP", lossless=True),
    "alpha": as_bytes(Image.new("RGBA", (51, 33), (1, 2, 3, 4)), "WEBP"),
    "much exif": exif_jpeg(),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_sizes_of_images(kind: str) -> None:
    data = IMAGES[kind]
    assert size_of(MemoryTar(b"head" + data, DISK), 4, len(data)) == (51, 33)
    starts = np.array([0, len(data)], np.int64)
    widths, heights = image_sizes(data * 2, starts, starts + len(data))
    if kind in ("JPEG", "PNG", "WEBP", "progressive", "lossless", "alpha"):
        assert widths.tolist() == [51, 51]
        assert heights.tolist() == [33, 33]
    for length in range(min(len(data), 700)):  # nothing beyond the limit is believed
        cut = image_sizes(data[:length], starts[:1], np.array([length]))
        assert (int(cut[0][0]), int(cut[1][0])) in ((51, 33), (0, 0))


def test_a_png_whose_size_is_damaged_has_none() -> None:
    data = bytearray(IMAGES["PNG"])
    data[18] ^= 1
    with pytest.raises(BadImage):
        size_of(MemoryTar(bytes(data), DISK), 0, len(data))


def oracle(data: bytes, found: Found) -> tuple[list[str], list[str]]:
    """Return names of usable images, and of what is refused, by a rule written down once more."""
    images: dict[str, str] = {}
    good: list[str] = []
    bad: list[str] = []
    companions: list[str] = []
    for name, offset, size in found:
        base = name.rpartition("/")[2]
        stem, dot, suffix = base.partition(".")
        if not stem or not dot:
            continue
        key = name[: len(name) - len(base)] + stem
        kind = suffix.rpartition(".")[2].lower()
        if kind in ("cls", "json", "txt"):
            companions.append(key)
        elif kind in ("jpg", "png"):
            try:
                open_image(data[offset : offset + size])
                (bad if key in images else good).append(name)
            except BadImage:
                bad.append(name)
            images.setdefault(key, name)
    return good, bad + [key for key in dict.fromkeys(companions) if key not in images]


def hostile(seed: int) -> tuple[bytes, bytes]:
    """Return a tar with some oddities, and the same damaged in some way or not at all."""
    rng = random.Random(seed)
    members: list[Member] = []
    for number in range(rng.randrange(12)):
        data = rng.choice(PICTURES)
        name = f"{rng.choice(['', 'folder/', LONG[:-8], 'ü/'])}{number:04d}"
        if rng.random() < 0.9:
            members.append(
                (f"{name}.{suffix_of(data)}", data if rng.random() < 0.9 else data[: rng.randrange(TOO_SHORT)])
            )
        if rng.random() < 0.1:
            members.append((f"{name}.{rng.choice(['png', 'JPG', 'seg.png'])}", rng.choice(PICTURES)))
        if rng.random() < 0.5:
            content = rng.choice([b"3", b'{"a": 1}', b"{", b"\xff"])
            members.append((f"{name}.{rng.choice(['cls', 'json', 'txt', 'bin'])}", content))
    format = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    whole = make_tar(members, format, mtime=rng.choice([1, 1.5]) if format == tarfile.PAX_FORMAT else 1)
    damaged = bytearray(whole)
    match rng.randrange(6):
        case 0:
            del damaged[rng.randrange(len(damaged)) :]
        case 1 | 2:
            end = max(512, len(whole.rstrip(b"\0")))
            for _ in range(rng.choice([1, 1, 3])):
                damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
        case 3:
            damaged = (
                bytearray(gzip.compress(whole, 1)) if rng.random() < 0.3 else damaged + whole[: rng.randrange(3000)]
            )
        case 4:
            start = rng.randrange(len(damaged) // 512) * 512
            damaged[start : start + 512] = bytes(512) if rng.random() < 0.5 else rng.randbytes(512)
        case _:
            pass
    return whole, bytes(damaged)


def check_hostile(seed: int) -> bool:
    """Check that a tar gives the right count or a reason; return whether it gave the count."""
    whole, data = hostile(seed)
    expected = by_tarfile(data)
    original = by_tarfile(whole)
    assert original is not None
    results = []
    for pace in PACES.values():
        found, ending = files(data, pace)
        results.append((found, ending))
        if ending.damage is None:
            assert found == (original if expected is None else expected), seed
        else:
            assert expected is None, (seed, ending.damage)
    indexed = index_tar(MemoryTar(data, [*PACES.values()][seed % 3]), "t", min_side=1)
    good, bad = oracle(data, results[0][0])
    # Of an image whose own bytes were flipped, Pillow may refuse what is only decoded later.
    doubtful = {
        printable(name)
        for name, offset, size in results[0][0]
        if size >= TOO_SHORT and data[offset : offset + size] not in PICTURES
    }
    taken = [key[2:] for key in indexed.key.slice(0, len(indexed.key))]
    assert [name for name in taken if name not in doubtful] == [n for n in map(printable, good) if n not in doubtful]
    left_out = sorted(key[2:] for key, _ in indexed.refused if key[2:] not in doubtful)
    assert left_out == sorted(name for name in map(printable, bad) if name not in doubtful), seed
    assert results[0] == results[1] == results[2]
    return results[0][1].damage is None


def test_hostile_tars_give_a_right_count_or_a_reason() -> None:
    counted = [check_hostile(seed) for seed in range(100)]
    assert 20 < sum(counted) < 80


@pytest.mark.slow
def test_many_hostile_tars_give_a_right_count_or_a_reason() -> None:
    for seed in range(100, 2100):
        began = time.monotonic()
        check_hostile(seed)
        assert time.monotonic() - began < 20
