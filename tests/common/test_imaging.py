"""Any file that people call an image becomes the right pixels, or a reason why not."""

import io
import struct
import zlib

import numpy as np
import pytest
from picture_files import as_bytes, make_picture
from PIL import Image

from pipeline.common.imaging import (
    BadImage,
    Pixels,
    _plain_jpeg,
    decode,
    encode,
    grid,
    is_ready,
    labeled_sheet,
    load_image,
    open_image,
    upright,
)
from pipeline.common.shapes.frame import Frame, place
from pipeline.data.build.transform import Recipe

RED = (200, 30, 40)


def bomb(width: int, height: int) -> bytes:
    """Return a tiny PNG that claims a huge size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def palette_with_hole() -> bytes:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, *RED])
    image.paste(0, (0, 0, 10, 20))
    return as_bytes(image, "PNG", transparency=0)


def animation() -> bytes:
    frames = [Image.new("RGB", (20, 20), color) for color in (RED, (0, 0, 255))]
    return as_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])


def cmyk() -> bytes:
    return as_bytes(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG", quality=95)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (as_bytes(Image.new("L", (20, 20), 77), "PNG"), (77, 77, 77)),
        (as_bytes(Image.fromarray(np.full((20, 20), 77 * 257, np.uint16)), "PNG"), (77, 77, 77)),
        (as_bytes(Image.new("RGBA", (20, 20), (*RED, 0)), "PNG"), (255, 255, 255)),
        (as_bytes(Image.new("RGBA", (20, 20), (0, 0, 0, 127)), "PNG"), (128, 128, 128)),
        (as_bytes(Image.new("LA", (20, 20), (0, 0)), "PNG"), (255, 255, 255)),
        (as_bytes(Image.new("1", (20, 20), 1), "PNG"), (255, 255, 255)),
        (cmyk(), (255, 0, 0)),
        (animation(), RED),
        (as_bytes(Image.new("RGB", (1, 1), RED), "PNG"), RED),
        (as_bytes(Image.new("RGB", (300, 2), RED), "BMP"), RED),
        (as_bytes(Image.new("RGB", (20, 20), RED), "TIFF"), RED),
        (as_bytes(Image.new("RGB", (20, 20), RED), "PPM"), RED),
    ],
    ids=[
        "gray",
        "16-bit",
        "transparent",
        "half",
        "gray+alpha",
        "bilevel",
        "cmyk",
        "animated",
        "1x1",
        "wide",
        "tiff",
        "ppm",
    ],
)
def test_every_mode_becomes_rgb(data: bytes, expected: tuple[int, int, int]) -> None:
    image = load_image(data, Frame(8, 3))
    assert image.shape == (8, 8, 3)
    assert np.abs(image.astype(int) - expected).max() <= 2


def test_transparency_of_a_palette_is_white_only_where_it_is() -> None:
    image = load_image(palette_with_hole(), Frame(20, 3))
    assert tuple(image[5, 2]) == (255, 255, 255)
    assert tuple(image[5, 17]) == RED


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (20, 20), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 20, 10))  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: white on the right
    shown = load_image(as_bytes(image, "JPEG", quality=95, exif=exif), Frame(20, 3))
    assert shown[:, 12:].min() > 240
    assert shown[:, :8].max() < 15


def test_the_middle_is_cropped_and_resizing_antialiases() -> None:
    stripes = np.zeros((64, 200, 3), np.uint8)
    stripes[:, 68:132] = np.tile(np.array([0, 255], np.uint8).repeat(1), 32)[None, :, None]
    small = load_image(encode(stripes, "png"), Frame(16, 3))
    assert np.abs(small.astype(int) - 128).max() < 20  # stripes of one pixel average to gray, nothing of the border


def by_pillow(data: bytes, size: int, channels: int) -> Pixels:
    """Return what `load_image` makes of an image by Pillow alone."""
    image = open_image(data)
    image.draft(None, (2 * size, 2 * size))
    return place(upright(image, channels), Frame(size, channels))


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"subsampling": "4:4:4"}),
        ("RGB", {"subsampling": "4:2:2"}),
        ("RGB", {"subsampling": "4:2:0"}),
        ("RGB", {"progressive": True}),
        ("RGB", {"keep_rgb": True}),
        ("L", {}),
    ],
)
def test_plain_jpegs_get_the_pixels_of_pillow_without_it(mode: str, options: dict[str, object]) -> None:
    noise = np.random.default_rng(1).normal(0, 20, (300, 300, 3))
    for width, height in ((256, 256), (255, 129), (64, 64), (1, 3), (170, 300)):
        picture = np.clip(make_picture(width, width, height) + noise[:height, :width], 0, 255).astype(np.uint8)
        data = as_bytes(Image.fromarray(picture).convert(mode), "JPEG", quality=80, **options)
        for size, channels in ((16, 3), (32, 1), (128, 3)):
            assert np.array_equal(load_image(data, Frame(size, channels)), by_pillow(data, size, channels))
            assert _plain_jpeg(data, Frame(size, channels)) is not None


@pytest.mark.parametrize("what", ["exif", "xmp", "cmyk", "cut", "damaged"])
def test_other_jpegs_are_left_to_pillow(what: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(make_picture(1, 200, 100))
    data = {
        "exif": lambda: as_bytes(image, "JPEG", exif=exif),
        "cmyk": lambda: as_bytes(image.convert("CMYK"), "JPEG"),
        "xmp": lambda: as_bytes(image, "JPEG", xmp=b'<x tiff:Orientation="6"/>'),
        "cut": lambda: as_bytes(image, "JPEG")[:-40],
        "damaged": lambda: as_bytes(image, "JPEG", quality=95).replace(b"\xff\xda", b"\xff\xda\xff\xff"),
    }[what]()
    assert _plain_jpeg(data, Frame(32, 3)) is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, I am a text", "not an image"),
        (encode(make_picture(1, 64, 64), "jpg")[:-300], "truncated"),
        (encode(make_picture(1, 64, 64), "png")[:2000], "truncated"),
        (encode(make_picture(1, 64, 64), "webp")[:300], "undecodable"),
        (bomb(30_000, 30_000), "too many pixels"),
        (bomb(12_000, 12_000), "too many pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        (as_bytes(Image.fromarray(np.full((9, 9), 7, np.float32)), "TIFF"), "floating-point pixels from 7"),
    ],
    ids=["empty", "text", "jpg cut", "png cut", "webp cut", "bomb", "smaller bomb", "program", "float"],
)
def test_what_cannot_be_used_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        load_image(data, Frame(16, 3))


def test_only_a_finished_image_is_passed_through() -> None:
    picture = make_picture(3, 32, 32)
    assert is_ready(encode(picture, "png"), "png", Frame(32, 3))
    assert not is_ready(encode(picture, "png"), "png", Frame(31, 3))
    assert not is_ready(encode(picture, "png"), "png", Frame(32, 1))
    assert not is_ready(encode(picture, "webp"), "png", Frame(32, 3))
    exif = Image.Exif()
    exif[0x0112] = 3
    assert not is_ready(as_bytes(Image.fromarray(picture), "JPEG", exif=exif), "jpg", Frame(32, 3))
    assert not is_ready(animation(), "webp", Frame(20, 3))
    assert not is_ready(encode(picture, "jpg")[:-200], "jpg", Frame(32, 3))
    with pytest.raises(BadImage, match="truncated"):
        is_ready(encode(picture, "png")[:-200], "png", Frame(32, 3))
    with pytest.raises(BadImage, match="undecodable"):
        is_ready(as_bytes(Image.fromarray(picture), "PNG", exif=b"Exif\0\0nonsense"), "png", Frame(32, 3))


def test_a_jpeg_that_only_pillow_reads_is_encoded_anew() -> None:
    """Our reader takes libjpeg's warnings for errors: kept as it is, the picture would stop the training."""
    sound = encode(make_picture(3, 32, 32), "jpg")
    doubtful = sound[:-2] + b"more" + sound[-2:]  # bytes before the end marker
    with pytest.raises(BadImage):
        decode(doubtful)
    assert not is_ready(doubtful, "jpg", Frame(32, 3))
    stored = Recipe(size=32, channels=3, encoding="jpg", quality=95, min_side=1).convert(doubtful)
    assert isinstance(stored, bytes)
    assert np.abs(decode(stored).astype(int) - decode(sound)).mean() < 2
    assert Recipe(size=32, channels=3, encoding="jpg", quality=95, min_side=1).convert(sound) == sound


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("kind", "quality", "error"), [("png", 1, 0), ("webp", 100, 0), ("jpg", 95, 6), ("webp", 92, 12)]
)
def test_encoding_and_decoding_agree(kind: str, quality: int, error: int, channels: int) -> None:
    picture = make_picture(5, 32, 32, channels)
    back = decode(encode(picture, kind, quality), channels)  # type: ignore[arg-type]
    assert back.shape == picture.shape
    assert np.abs(back.astype(int) - picture).mean() <= error


def test_grid_places_images_row_by_row() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), np.uint8)
    laid = grid(images, 3)
    assert laid.shape == (4, 9, 1)
    assert laid[0, :, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert laid[2, :, 0].tolist() == [3, 3, 3, 4, 4, 4, 255, 255, 255]


def test_sheet_holds_all_groups_and_their_captions() -> None:
    rows = [("kept", np.zeros((2, 8, 8, 3), np.uint8)), ("dropped", np.full((3, 8, 8, 1), 9, np.uint8))]
    sheet = labeled_sheet(rows)
    assert (sheet == 0).all(-1).sum() >= 128
    assert (sheet == 9).all(-1).sum() == 192
    assert Image.open(io.BytesIO(encode(sheet, "png"))).mode == "RGB"
