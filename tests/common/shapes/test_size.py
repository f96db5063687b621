"""Sizes are written one way, and those that the networks cannot have are refused with the nearest that they can."""

from typing import Any

import pytest

from pipeline.common.shapes.size import Stages, nearest, parse_size, refusal, stages, written
from pipeline.config import NetworkConfig


@pytest.mark.parametrize(
    ("value", "size"),
    [(64, (64, 64)), ("64", (64, 64)), ("96x64", (96, 64)), (" 64X96 ", (64, 96)), ("28×28", (28, 28))],
)
def test_a_size_is_width_times_height(value: Any, size: tuple[int, int]) -> None:
    assert parse_size(value) == size


@pytest.mark.parametrize("value", ["", "x", "64x", "-64", "64.0", 64.0, True, None, [64, 64], "64x64x3", "١٢٨"])
def test_what_is_no_size_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
        parse_size(value)


def test_a_square_is_written_as_a_number() -> None:
    assert (written(64, 64), written(96, 64)) == (64, "96x64")
    assert NetworkConfig(image_size="64x64") == NetworkConfig(image_size=64)
    assert NetworkConfig(image_size="64x064").model_dump()["image_size"] == 64


@pytest.mark.parametrize(
    ("size", "found"),
    [
        ((32, 32), Stages(3, 4, 4)),
        ((64, 64), Stages(4, 4, 4)),
        ((128, 128), Stages(5, 4, 4)),
        ((16, 16), Stages(2, 4, 4)),
        ((28, 28), Stages(2, 7, 7)),
        ((48, 48), Stages(3, 6, 6)),
        ((96, 64), Stages(4, 4, 6)),
        ((384, 256), Stages(6, 4, 6)),
        ((512, 512), Stages(7, 4, 4)),
        ((512, 384), Stages(7, 3, 4)),
        ((12, 12), None),
        ((100, 100), None),
        ((128, 32), None),
        ((1024, 1024), None),
    ],
)
def test_both_sides_are_doubled_equally_often(size: tuple[int, int], found: Stages | None) -> None:
    assert stages(*size) == found


def test_all_sizes_are_as_the_rule_says() -> None:
    squares = [side for side in range(1, 600) if stages(side, side)]
    assert squares[:8] == [16, 20, 24, 28, 32, 40, 48, 56]
    assert squares[-7:] == [192, 224, 256, 320, 384, 448, 512]
    for width, height in [(side, other) for side in squares for other in squares]:
        if found := stages(width, height):
            assert (found.width << found.doublings, found.height << found.doublings) == (width, height)


@pytest.mark.parametrize(
    ("size", "others"),
    [
        ((100, 100), [(96, 96), (112, 112)]),
        ((1, 1), [(16, 16), (20, 20)]),
        ((4096, 4096), [(448, 448), (512, 512)]),
        ((100, 64), [(96, 64), (112, 64)]),
    ],
)
def test_the_nearest_sizes_are_named(size: tuple[int, int], others: list[tuple[int, int]]) -> None:
    found = nearest(*size)
    assert all(stages(*one) for one in found)
    assert found == others
    assert all(f"{width}x{height}" in refusal(*size) for width, height in others)
