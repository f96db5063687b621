"""Pictures of any proportion become images of one size, and transparency survives it."""

import io

import numpy as np
import pytest
from picture_files import make_picture
from PIL import Image

from pipeline.common.imaging import (
    Pixels,
    decode,
    encode,
    grid,
    is_ready,
    labeled_sheet,
    load_image,
    open_image,
    reframe,
    upright,
)
from pipeline.common.shapes.frame import Fit, Frame, over, place, premultiply, sound, straight
from pipeline.data.build.transform import Recipe


def wide() -> Image.Image:
    """Return a picture of 40 x 20: left half red, right half blue."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20, 0], pixels[:, 20:, 2] = 255, 255
    return Image.fromarray(pixels)


def test_crop_takes_the_largest_part_of_the_images_proportion() -> None:
    picture = Image.fromarray(make_picture(1, 40, 20))
    assert np.array_equal(place(picture, Frame("30x20", 3)), np.asarray(picture)[:, 5:35])
    assert np.array_equal(place(picture, Frame("40x10", 3)), np.asarray(picture)[5:15])
    assert place(picture, Frame("20x30", 1)).shape == (30, 20, 3)


def test_pad_keeps_the_whole_picture_between_margins() -> None:
    padded = place(wide(), Frame(40, 3, fit="pad", fill="#00ff00"))
    assert np.array_equal(padded[10:30], np.asarray(wide()))
    assert (padded[:10] == (0, 255, 0)).all()
    assert (padded[30:] == (0, 255, 0)).all()
    edge = place(wide(), Frame(40, 3, fit="pad", fill="edge"))
    assert (edge[0, :20] == (255, 0, 0)).all()
    assert (edge[-1, 20:] == (0, 0, 255)).all()
    assert not place(wide(), Frame(40, 3, fit="pad"))[:10].any()
    assert not place(wide().convert("RGBA"), Frame(40, 4, fit="pad"))[:10].any(), "transparent"


def test_stretch_shows_all_of_the_picture_in_the_size() -> None:
    image = place(wide(), Frame(16, 3, fit="stretch"))
    assert image.shape == (16, 16, 3)
    assert image[:, 0, 0].min() > 250
    assert image[:, -1, 2].min() > 250


def test_color_under_transparency_does_not_bleed() -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, :16] = (200, 100, 50, 255)
    pixels[:, 16:] = (0, 255, 0, 0)  # green that nobody sees
    small = load_image(encode_straight(pixels), Frame(8, 4))
    assert (small[..., :3] <= small[..., 3:]).all()
    assert (small[:, :1] == (200, 100, 50, 255)).all()
    visible = straight(small)[small[..., 3] > 30][:, :3]
    assert np.abs(visible.astype(int) - (200, 100, 50)).max() < 8
    assert not small[:, 7:].any()


def encode_straight(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_sound_value_survives_files_with_straight_alpha() -> None:
    alpha, color = np.meshgrid(np.arange(256), np.arange(256))
    pixels = sound(np.stack([color, color // 2, 255 - color, alpha], -1).astype(np.uint8))
    assert np.array_equal(premultiply(straight(pixels)), pixels)
    for format in ("png", "webp"):
        assert np.array_equal(decode(encode(pixels, format, 100), 4), pixels)


def test_files_hold_straight_alpha() -> None:
    pixels = np.array([[[64, 32, 0, 128], [9, 9, 9, 0]]], np.uint8)  # the last is impossible, as a network may make it
    stored = np.asarray(Image.open(io.BytesIO(encode(pixels, "png"))))
    assert stored.tolist() == [[[128, 64, 0, 128], [0, 0, 0, 0]]]


@pytest.mark.parametrize("encoding", ["packed", "png", "webp"])
def test_what_a_build_stores_is_what_is_read(encoding: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 4), np.uint8)
    recipe = Recipe.model_validate(
        {"size": "16x24", "channels": 4, "encoding": encoding, "quality": 100, "min_side": 1}
    )
    stored = recipe.convert(encode_straight(pixels))
    read = decode(stored, 4) if isinstance(stored, bytes) else stored
    assert np.array_equal(read, premultiply(pixels))
    if encoding == "png":
        assert stored == encode_straight(pixels), "passed through"


def test_other_channels_are_as_wanted() -> None:
    opaque = make_picture(3, 16, 16)
    assert (load_image(encode(opaque, "png"), Frame(16, 4))[..., 3] == 255).all()
    assert (load_image(encode(opaque, "jpg"), Frame(16, 4))[..., 3] == 255).all()
    assert (decode(encode(opaque, "jpg"), 4)[..., 3] == 255).all()
    half = np.full((16, 16, 4), (0, 0, 0, 128), np.uint8)
    assert (reframe(half, Frame(16, 3)) == 127).all(), "over white"
    assert not is_ready(encode(opaque, "png"), "png", Frame(16, 4))
    assert not is_ready(encode(half, "png"), "png", Frame(16, 3))


def test_grids_show_transparency_on_a_checkerboard() -> None:
    nothing = np.zeros((2, 16, 16, 4), np.uint8)
    shown = grid(nothing, 2)
    assert shown.shape == (16, 32, 3)
    assert {tuple(pixel) for pixel in shown.reshape(-1, 3).tolist()} == {(255, 255, 255), (204, 204, 204)}
    assert labeled_sheet([("nothing", nothing)]).shape[2] == 3
    assert (over(np.array([[10, 20, 30, 255]], np.uint8), 255) == (10, 20, 30)).all()


def test_a_picture_on_its_side_fills_a_rectangle() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(make_picture(1, 640, 960)).save(buffer, "JPEG", exif=exif, quality=95)  # seen as 960 x 640
    turned = load_image(buffer.getvalue(), Frame("96x64", 3))
    plain = io.BytesIO()
    Image.fromarray(make_picture(1, 640, 960)).transpose(Image.Transpose.ROTATE_270).save(plain, "PNG")
    assert np.abs(turned.astype(int) - load_image(plain.getvalue(), Frame("96x64", 3))).mean() < 2


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_jpegs_fit_as_other_pictures(fit: Fit, channels: int) -> None:
    data = encode(make_picture(2, 70, 50), "jpg")
    frame = Frame("40x24", channels, fit=fit, fill="#102030" if fit == "pad" else "")
    assert np.array_equal(load_image(data, frame), place(upright(open_image(data), channels), frame))
