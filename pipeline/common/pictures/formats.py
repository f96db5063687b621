"""The formats of pictures that are decoded: their suffixes, how a file of each begins, and the extra that some need."""

import functools
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

HEAD_BYTES = 132
"""Bytes from a file's beginning that tell its format."""


class Extra(NamedTuple):
    """A format that is decoded only with another package."""

    name: str
    """The extra of pyproject.toml."""
    module: str
    """What has to be imported."""


SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "HEIF": (".heic", ".heif", ".heics", ".heifs", ".hif"),
    "JXL": (".jxl",),
    "DICOM": (".dcm", ".dicom"),
}
"""Pillow's names of the formats that are decoded, and DICOM. Others run programs (EPS), or are rarely used."""
USUAL = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
"""Those that every Pillow has."""
EXTRAS = {"HEIF": Extra("heif", "pillow_heif"), "JXL": Extra("jxl", "pillow_jxl"), "DICOM": Extra("dicom", "pydicom")}
_FEATURES = {"AVIF": "avif", "JPEG2000": "jpg_2000"}  # parts that a Pillow may lack

_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_SIGNATURES = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"GIF8", "GIF"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"\xff\x4f\xff\x51", "JPEG2000"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (0, b"\xff\x0a", "JXL"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"),
    (128, b"DICM", "DICOM"),
)


def kind_of(head: bytes) -> str | None:
    """Return the format of a file that begins with `head`, at least HEAD_BYTES of it, or None if it is no picture."""
    for start, signature, kind in _SIGNATURES:
        if head.startswith(signature, start):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        brands = {head[at : at + 4] for at in (8, *range(16, min(int.from_bytes(head[:4]), len(head)), 4))}
        return "AVIF" if brands & {b"avif", b"avis"} else "HEIF" if brands & _HEIF_BRANDS else None
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if head[:1] == b"P" and head[1:2] in (*map(bytes, zip(b"123456")), b"f", b"F") and head[2:3].isspace():
        return "PPM"
    return None


@functools.cache
def is_enabled(kind: str) -> bool:
    """Whether a format can be decoded here."""
    if kind in EXTRAS:
        return find_spec(EXTRAS[kind].module) is not None
    if kind in _FEATURES:
        from PIL import features

        return bool(features.check(_FEATURES[kind]))
    return True


@functools.cache
def enable(kind: str) -> bool:
    """Make Pillow decode a format, and return whether it does."""
    if not is_enabled(kind):
        return False
    if kind == "HEIF":
        import_module("pillow_heif").register_heif_opener()
    elif kind in EXTRAS:
        import_module(EXTRAS[kind].module)  # registers itself
    return True


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """Return the suffixes of all formats that can be decoded here, in lower case."""
    return frozenset(suffix for kind, suffixes in SUFFIXES.items() if is_enabled(kind) for suffix in suffixes)


def advice(kind: str) -> str:
    """Return what to do to have a format decoded that is not enabled."""
    if kind in EXTRAS:
        return f"pip install 'dcgan-pipeline[{EXTRAS[kind].name}]' reads them"
    return "a newer Pillow reads them"


def missing_format(suffix: str) -> str | None:
    """Return the format that a suffix belongs to if it is known and not enabled, else None."""
    return next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes and not is_enabled(kind)), None)
