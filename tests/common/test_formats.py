"""Every format that an enabled decoder reads is known by its suffixes and its first bytes; profiles become sRGB."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from picture_files import as_bytes, make_picture
from PIL import Image, ImageCms

from pipeline.common.imaging import BadImage, _plain_jpeg, is_ready, keeps_other_colors, load_image, open_image
from pipeline.common.pictures import formats
from pipeline.common.pictures.formats import EXTRAS, SUFFIXES, is_enabled, kind_of, picture_suffixes
from pipeline.common.shapes.frame import Frame

ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
"""Colorants of Adobe RGB (1998), as its profile states them: X, Y, Z of red, green and blue."""


def matrix_profile(colorants: tuple[tuple[float, ...], ...]) -> bytes:
    """Return an ICC profile of three colorants and sRGB's curve (ICC.1:2010, 8.3 and 10.16)."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    curve = b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249),
        **{b"%cXYZ" % c: b"XYZ \0\0\0\0" + fixed(*xyz) for c, xyz in zip(b"rgb", colorants, strict=True)},
        **{b"%cTRC" % c: curve for c in b"rgb"},
    }
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"test", 0x04200000, b"mntr", b"RGB ", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return header.ljust(128, b"\0") + table + body


def flat(mode: str = "RGB", color: Any = (60, 200, 60)) -> Image.Image:
    return Image.new(mode, (64, 64), color)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_profile_of_other_colors_is_converted(kind: str) -> None:
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = as_bytes(flat(), kind, icc_profile=matrix_profile(ADOBE), **options)
    for size in (64, 16):
        assert np.abs(load_image(data, Frame(size, 3)).astype(int) - (0, 200, 41)).max() <= 1 + (kind == "JPEG")
    assert not is_ready(data, "png" if kind == "PNG" else "jpg", Frame(64, 3))


@pytest.mark.parametrize(
    ("mode", "kind", "profile", "lost"),
    [
        ("RGB", "JPEG", b"no profile at all", True),
        ("RGB", "PNG", b"no profile at all", True),
        ("RGB", "WEBP", b"no profile at all", True),
        ("RGB", "TIFF", matrix_profile(ADOBE)[:150], True),
        ("CMYK", "JPEG", matrix_profile(ADOBE), True),
        ("P", "PNG", matrix_profile(ADOBE), True),
        ("RGB", "JPEG", matrix_profile(ADOBE), False),
        ("RGB", "PNG", None, False),
    ],
)
def test_a_profile_that_cannot_be_used_is_seen(mode: str, kind: str, profile: bytes | None, lost: bool) -> None:
    picture = flat().quantize(4) if mode == "P" else flat().convert(mode)
    options = {} if profile is None else {"icc_profile": profile}
    assert keeps_other_colors(as_bytes(picture, kind, **options)) is lost
    assert not keeps_other_colors(np.zeros((2, 2, 3), np.uint8))
    assert not keeps_other_colors(b"\xff\xd8 broken ICC_PROFILE\0")


def test_srgb_profiles_of_any_maker_change_nothing() -> None:
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    other = matrix_profile(((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141)))
    picture = Image.fromarray(make_picture(1, 64, 64))
    for profile in (own, other, b"no profile at all"):
        data = as_bytes(picture, "JPEG", icc_profile=profile)
        assert np.array_equal(load_image(data, Frame(32, 3)), load_image(as_bytes(picture, "JPEG"), Frame(32, 3)))
        assert _plain_jpeg(data, Frame(32, 3)) is not None, "the quick way stays open"
        assert is_ready(data, "jpg", Frame(64, 3))


def test_alpha_gray_and_cmyk_are_converted_too() -> None:
    profile = matrix_profile(ADOBE)
    half = as_bytes(flat("RGBA", (60, 200, 60, 0)), "PNG", icc_profile=profile)
    assert load_image(half, Frame(8, 3)).min() == 255, "what is transparent stays so"
    solid = as_bytes(flat("RGBA", (60, 200, 60, 255)), "PNG", icc_profile=profile)
    assert np.abs(load_image(solid, Frame(8, 3)).astype(int) - (0, 200, 41)).max() <= 1
    expected = np.asarray(Image.new("RGB", (1, 1), (0, 200, 41)).convert("L"))[0, 0]
    assert abs(int(load_image(solid, Frame(8, 1))[0, 0, 0]) - int(expected)) <= 1
    cmyk = as_bytes(flat("CMYK", (0, 255, 255, 0)), "JPEG", icc_profile=profile, quality=95)
    red = load_image(cmyk, Frame(8, 3)).astype(int)
    assert np.abs(red - (255, 0, 0)).max() <= 2, "an RGB profile says nothing of CMYK"


def test_floating_point_from_0_to_1_is_gray_and_else_refused() -> None:
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    read = load_image(as_bytes(Image.fromarray(values), "TIFF"), Frame(8, 1))[..., 0]
    assert np.array_equal(read, np.round(values * 255).astype(np.uint8))
    for wrong in (values * 300, values - 1, np.full((8, 8), np.nan, np.float32)):
        with pytest.raises(BadImage, match="floating-point pixels from"):
            load_image(as_bytes(Image.fromarray(wrong.astype(np.float32)), "TIFF"), Frame(8, 1))


@pytest.mark.parametrize("kind", [kind for kind in SUFFIXES if kind not in EXTRAS])
def test_each_format_is_known_by_its_first_bytes(kind: str) -> None:
    if not is_enabled(kind):
        pytest.skip(f"this Pillow has no {kind}")
    picture = Image.fromarray(make_picture(2, 40, 40))
    data = as_bytes(picture, kind, **({"quality": 95} if kind in ("JPEG", "AVIF", "WEBP") else {}))
    assert kind_of(data[: formats.HEAD_BYTES]) == kind
    Image.init()
    claimed = {suffix for suffix, name in Image.registered_extensions().items() if name == kind}
    assert claimed - {".dib", ".bw"} <= picture_suffixes()
    assert np.abs(load_image(data, Frame(40, 3)).astype(int) - np.asarray(picture)).mean() < 12


def test_text_is_no_picture() -> None:
    for head in (b"BMW is a maker of cars, and this is a text about them", b"P5", b"hello", b"", b"RIFF....WAVE"):
        assert kind_of(head) is None


def test_ten_bits_are_scaled() -> None:
    pytest.importorskip("pillow_heif", reason="pillow-heif, of the extra heif, is not installed")
    import pillow_heif

    deep = np.full((64, 64, 3), 700 << 6, np.uint16)
    file = pillow_heif.from_bytes("RGB;16", (64, 64), deep.tobytes())
    buffer = io.BytesIO()
    file.save(buffer, quality=-1)
    assert kind_of(buffer.getvalue()[:64]) == "HEIF"
    assert np.abs(load_image(buffer.getvalue(), Frame(64, 3)).astype(int) - 700 / 1023 * 255).max() <= 2


def test_jpeg_xl_is_read_with_its_extra() -> None:
    pytest.importorskip("pillow_jxl", reason="pillow-jxl-plugin, of the extra jxl, is not installed")
    picture = make_picture(2, 40, 40)
    data = as_bytes(Image.fromarray(picture), "JXL", lossless=True)
    assert kind_of(data[:64]) == "JXL"
    assert np.array_equal(load_image(data, Frame(40, 3)), picture)


def test_a_format_without_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "EXTRAS", {"HEIF": formats.Extra("heif", "no_such_package")})
    formats.is_enabled.cache_clear()
    formats.enable.cache_clear()
    try:
        with pytest.raises(BadImage, match=r"HEIF pictures: pip install 'dcgan-pipeline\[heif\]' reads them"):
            open_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    finally:
        formats.is_enabled.cache_clear()
        formats.enable.cache_clear()
