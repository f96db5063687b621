"""The files in a zip or a tar, and in archives one level inside it: found by one listing, each read by its place."""

import bz2
import lzma
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipeline.common.errors import DataError, UsageError, first_line
from pipeline.common.imaging import BadImage
from pipeline.common.pictures.formats import HEAD_BYTES, kind_of
from pipeline.common.storage import open_ranges
from pipeline.data.sources.archives.files import OpenArchive, Window, open_archive, plain, unpack
from pipeline.data.sources.interface import Listing
from pipeline.data.sources.tars import open_members

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
"""How the name of an archive ends."""
LARGEST_FILE = 1 << 29
"""Bytes of the largest file that is read from an archive: more than MAX_PIXELS need."""
LOCAL = struct.Struct("<4s5H3L2H")
"""The header before each file of a zip; the lengths of its name and of its extra field come last."""
END = struct.Struct("<4s4H2LH")
"""The last record of a zip, before its comment; the fifth value is the number of its files."""
PLAIN = -1
"""The method of a file that lies in its archive as it is, without a header."""


class Member(NamedTuple):
    """Where a file lies in an archive."""

    archive: str
    """Path or URL."""
    offset: int
    """Of the file, or of its header in a zip."""
    span: int
    """Bytes from there on that surely hold it, or in a zip, most likely."""
    packed: int
    """Its bytes in the archive."""
    bytes: int
    """Its bytes."""
    method: int
    """How it is compressed, as zips number that, or PLAIN."""
    crc: int


def is_archive(name: str) -> bool:
    """Whether a file is an archive, by its name."""
    return name.lower().endswith(ARCHIVES)


def stem(name: str) -> str:
    """Return the name of an archive without its suffix: of the folder that it stands for."""
    suffix = max((end for end in ARCHIVES if name.lower().endswith(end)), key=len, default="")
    return name[: len(name) - len(suffix)]


def find_members(location: str, listing: Listing) -> list[tuple[str, Member]]:
    """Return (path, place) of the files in an archive. Of one that holds nothing but archives, the files in these.

    What cannot be read is refused in `listing`, links are counted there. Raises UserError for a damaged archive.
    """
    opened = open_archive(location, listing)
    with opened.file:
        found = list(_members(opened, location, listing))
        inner = [(path, member) for path, member in found if is_archive(path)]
        if not inner or any(not _is_table(path) for path, _ in found if not is_archive(path)):
            return found
        files = [(path, member) for path, member in found if not is_archive(path)]
        for path, member in inner:
            shown = f"{location}: {path}"
            with (nested := _open_inside(opened, member, shown, listing)).file:
                files += ((f"{stem(path)}/{name}", place) for name, place in _members(nested, shown, listing))
        return files


def _is_table(path: str) -> bool:
    return path.lower().endswith((".csv", ".txt", ".json", ".jsonl", ".md", ".parquet", ".pdf", ".html"))


def _open_inside(outer: OpenArchive, member: Member, shown: str, listing: Listing) -> OpenArchive:
    """Return an archive that lies in another one, where it is if it is not compressed there."""
    if member.method in (PLAIN, zipfile.ZIP_STORED):
        start = member.offset - outer.start
        if member.method != PLAIN:
            outer.file.seek(start)
            fields = LOCAL.unpack(outer.file.read(LOCAL.size).ljust(LOCAL.size, b"\0"))
            start += LOCAL.size + fields[-2] + fields[-1]
        window = Window(outer.file, start, member.bytes)
        return plain(OpenArchive(window, outer.path, outer.start + start, member.bytes), shown, listing)
    outer.file.seek(0)
    with zipfile.ZipFile(outer.file) as archive:
        info = next(info for info in archive.infolist() if info.header_offset == member.offset - outer.start)
        with archive.open(info) as source:
            unpacked = unpack(source, member.packed, shown, listing)
    return plain(unpacked, shown, listing)


def _members(opened: OpenArchive, shown: str, listing: Listing) -> Iterator[tuple[str, Member]]:
    opened.file.seek(0)
    head = opened.file.read(HEAD_BYTES)
    opened.file.seek(0)
    if head[:2] != b"PK" and (kind := kind_of(head)) is not None:
        raise UsageError(f"{shown}: one picture ({kind}); expected the folder or the archive that holds the pictures")
    if head[:2] != b"PK" and ".tar" not in (name := shown.lower()) and not name.endswith((".tgz", ".tbz2", ".txz")):
        raise DataError(f"{shown}: neither a zip nor a tar; expected a folder or an archive of pictures")
    found = _in_zip(opened, shown, listing) if head[:2] == b"PK" else _in_tar(opened, shown, listing)
    seen: set[str] = set()
    for name, member in found:
        if (path := name.removeprefix("./")) in seen:
            listing.refused.add(path, "its name is in its archive twice")
        elif member.bytes > LARGEST_FILE and not is_archive(path):
            listing.refused.add(path, "too large a file")
        else:
            seen.add(path)
            yield path, member


def _in_tar(opened: OpenArchive, shown: str, listing: Listing) -> Iterator[tuple[str, Member]]:
    for path, offset, size in open_members(opened.file, shown, listing):
        yield path, Member(opened.path, opened.start + offset, size, size, size, PLAIN, 0)


def _in_zip(opened: OpenArchive, shown: str, listing: Listing) -> Iterator[tuple[str, Member]]:
    try:
        archive = zipfile.ZipFile(opened.file)
        infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, ArithmeticError, LookupError, NotImplementedError, struct.error) as error:
        raise DataError(f"{shown}: damaged zip: {first_line(error)}") from None
    end = archive.start_dir
    opened.file.seek(max(0, opened.size - END.size - len(archive.comment)))
    record = opened.file.read(END.size)
    if len(record) == END.size:
        signature, *_, stated, _, _, _ = END.unpack(record)
        if signature == b"PK\5\6" and stated not in (0xFFFF, len(infos) & 0xFFFF):  # of Zip64 it is the former
            listing.refused.unnamed[f"lost in a damaged zip, which states {stated:,} files: {shown}"] = 1
            listing.damaged = True
    for info in infos:
        if info.is_dir():
            continue
        if stat.S_ISLNK(info.external_attr >> 16):
            listing.passed["links"] += 1
        elif info.flag_bits & 1:
            listing.refused.add(info.filename, "encrypted")
        elif info.header_offset < 0 or info.header_offset + info.compress_size > end:
            listing.refused.add(info.filename, "outside of its zip")
        else:
            likely = LOCAL.size + len(info.filename.encode("utf-8", "replace")) + len(info.extra) + 32
            span = min(likely + info.compress_size, end - info.header_offset)
            yield (
                info.filename,
                Member(
                    opened.path,
                    opened.start + info.header_offset,
                    span,
                    info.compress_size,
                    info.file_size,
                    info.compress_type,
                    info.CRC,
                ),
            )


def read_member(member: Member, limit: int | None = None) -> bytes:
    """Return a file, or its first `limit` bytes. Raises BadImage where it is damaged or compressed in a rare way."""
    read = open_ranges(member.archive)
    if member.method == PLAIN:
        return read(member.offset, member.bytes if limit is None else min(limit, member.bytes))
    data = read(member.offset, member.span if limit is None else min(member.span, 4096 + limit))
    if len(data) < LOCAL.size or data[:4] != b"PK\3\4":
        raise BadImage("damaged zip (no header)")
    fields = LOCAL.unpack(data[: LOCAL.size])
    start = LOCAL.size + fields[-2] + fields[-1]
    if limit is None and (short := start + member.packed - len(data)) > 0:
        data += read(member.offset + len(data), short)
    packed = memoryview(data)[start : start + member.packed]
    content = _inflate(packed, member, member.bytes if limit is None else min(limit, member.bytes))
    if limit is None and (len(content) != member.bytes or zlib.crc32(content) != member.crc):
        raise BadImage("damaged zip (checksum)")
    return content


def _inflate(packed: memoryview, member: Member, size: int) -> bytes:
    """Return the first `size` bytes of what was compressed; no more are made of it."""
    try:
        match member.method:
            case zipfile.ZIP_STORED:
                return bytes(packed[:size])
            case zipfile.ZIP_DEFLATED:
                return zlib.decompressobj(-15).decompress(packed, size) if size else b""
            case zipfile.ZIP_BZIP2:
                return bz2.BZ2Decompressor().decompress(bytes(packed), size)
            case zipfile.ZIP_LZMA:
                length = int.from_bytes(packed[2:4], "little")
                filters = [_lzma_filter(bytes(packed[4 : 4 + length]))]
                decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
                return decoder.decompress(bytes(packed[4 + length :]), size)
    except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError) as error:
        raise BadImage(f"damaged zip ({type(error).__name__})") from None
    raise BadImage(f"compressed in the zip by method {member.method}; pack it again with deflate")


def _lzma_filter(properties: bytes) -> dict[str, Any]:
    """Return the filter that the five bytes of LZMA's properties describe, as the lzma module takes it."""
    if len(properties) != 5:
        raise ValueError("properties of LZMA")
    first, dictionary = properties[0], int.from_bytes(properties[1:], "little")
    if dictionary > LARGEST_FILE:
        raise ValueError("a dictionary larger than any picture")
    return {
        "id": lzma.FILTER_LZMA1,
        "lc": first % 9,
        "lp": first // 9 % 5,
        "pb": first // 45,
        "dict_size": max(dictionary, 4096),
    }
