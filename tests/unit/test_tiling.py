"""Grids against brute force, and tiles that put together again are the image."""

import itertools
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mm1.config.presets import preset
from megatron_mm1.data.image_tokens import tiling_of
from megatron_mm1.data.images.geometry import tiles
from megatron_mm1.data.tiling import Tiling, fit

SIDES = st.integers(1, 3000)
GREY = torch.full((3, 1, 1), 100.0)


def brute_force(height: int, width: int, *, side: int, low: int, high: int) -> tuple[float, float]:
    """The least (resolution lost, padding) of any grid, in px, where the image is not rounded to whole px."""

    def cost(rows: int, columns: int) -> tuple[float, float]:
        scale = min(rows * side / height, columns * side / width)
        kept = height * width * scale**2
        return max(0.0, height * width - kept), rows * columns * side**2 - kept

    grids = [grid for grid in itertools.product(range(1, high + 1), repeat=2) if low <= grid[0] * grid[1] <= high]
    without_loss = [cost(*grid) for grid in grids if grid[0] * side >= height and grid[1] * side >= width]
    return min(without_loss or [cost(*grid) for grid in grids])


@given(SIDES, SIDES, st.sampled_from([(1, 1), (1, 4), (3, 9), (2, 12)]))
def test_grid_loses_and_pads_least(height: int, width: int, limits: tuple[int, int]) -> None:
    tiling = Tiling("dynamic", side=336, min_tiles=limits[0], max_tiles=limits[1])
    ((rows, columns),) = tiling.grids(np.array([[height, width]]), 1).tolist()
    assert limits[0] <= rows * columns <= limits[1]
    scale = min(rows * 336 / height, columns * 336 / width)
    kept = height * width * scale**2
    lost, padding = brute_force(height, width, side=336, low=limits[0], high=limits[1])
    rounding = 336 * max(rows, columns)  # a row or column of px
    assert max(0.0, height * width - kept) <= lost + rounding
    assert rows * columns * 336**2 - kept <= padding + rounding


@given(st.lists(st.tuples(SIDES, SIDES, st.integers(1, 4)), max_size=20))
def test_many_images_get_what_each_gets_alone(images: list[tuple[int, int, int]]) -> None:
    tiling = Tiling("dynamic", max_tiles=9)
    sizes = np.array([image[:2] for image in images], np.int64).reshape(-1, 2)
    counts = np.array([image[2] for image in images], np.int64)
    alone = [int(tiling.tiles_of(sizes[[n]], int(counts[n]))[0]) for n in range(len(images))]
    assert tiling.tiles_of(sizes, counts).tolist() == alone
    assert tiling.tiles_of_grids(tiling.grids(sizes, counts)).tolist() == alone


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((100, 100), (1, 1)),  # of grids that pad equally the one with the fewest tiles
        ((378, 378), (1, 1)),
        ((379, 378), (2, 2)),  # covers with no more padding than rounding gives; 2 x 1 would pad half
        ((100, 300), (1, 3)),
        ((756, 378), (2, 1)),
        ((3000, 3000), (2, 2)),  # nothing covers it: where it stays largest
        ((3000, 100), (4, 1)),
    ],
)
def test_grids_of_some_sizes(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert Tiling("dynamic").grids(np.array([size]), 1).tolist() == [list(grid)]


@pytest.mark.parametrize(
    ("size", "limits", "grid"),
    [
        ((4, 4), (2, 2), (1, 2)),  # 1 x 2 and 2 x 1 both pad 16 px: the fewest rows
        ((3, 2), (3, 4), (3, 1)),  # as it is rounded, 3 x 1 and 2 x 2 both pad 24 px: the fewest tiles come first
    ],
)
def test_of_grids_that_pad_alike_the_first_is_taken(
    size: tuple[int, int], limits: tuple[int, int], grid: tuple[int, int]
) -> None:
    tiling = Tiling("dynamic", side=4, min_tiles=limits[0], max_tiles=limits[1])
    assert tiling.grids(np.array([size]), 1).tolist() == [list(grid)]


def test_limits_are_the_configurations() -> None:
    config = preset("mm1-3b")
    config = replace(config, data=replace(config.data, image_tiling="dynamic", min_image_tiles=3, max_image_tiles=9))
    assert tiling_of(config) == Tiling("dynamic", side=config.model.vision.image_size, min_tiles=3, max_tiles=9)


@pytest.mark.parametrize(("num_images", "expected"), [(1, 5), (2, 5), (3, 1)])
def test_examples_with_three_images_are_not_tiled_dynamically(num_images: int, expected: int) -> None:
    sizes = np.full((num_images, 2), 2000)
    assert Tiling("dynamic").tiles_of(sizes, num_images).tolist() == [expected] * num_images
    assert Tiling("overview_and_crops").tiles_of(sizes, num_images).tolist() == [5] * num_images
    assert Tiling().tiles_of(sizes, num_images).tolist() == [1] * num_images


@given(SIDES, SIDES, st.integers(1, 5), st.integers(1, 5))
def test_fitted_image_touches_two_edges_and_keeps_its_proportions(
    height: int, width: int, rows: int, columns: int
) -> None:
    fitted = fit(np.array([height, width]), np.array([rows, columns]), side=50)
    scale = min(rows * 50 / height, columns * 50 / width)
    assert (fitted <= np.array([rows, columns]) * 50).all()
    assert (fitted == np.array([rows, columns]) * 50).any()
    assert np.abs(fitted - np.maximum(np.array([height, width]) * scale, 1)).max() <= 0.5 + 1e-6


def test_half_a_pixel_is_rounded_up() -> None:
    """Whatever the number before it: to the nearest even one 12.5 would become 12."""
    fitted = fit(np.array([[4, 1], [1, 4]]), np.array([1, 1]), side=50)
    assert fitted.tolist() == [[50, 13], [13, 50]]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(1, 3))
def test_tiles_put_together_are_the_padded_image(height: int, width: int, rows: int, columns: int) -> None:
    """In reading order, the image in the middle, and the overview last."""
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    tiling = Tiling("dynamic", side=16, max_tiles=9)
    cut = tiles(image, grid=(rows, columns), tiling=tiling, mode="squash", padding=GREY)
    places = tiling.places((rows, columns)).tolist()
    assert len(cut) == len(places)
    assert places.index([-1, -1]) == len(places) - 1
    if len(places) == 1:
        return
    whole = torch.full((3, rows * 16, columns * 16), 255, dtype=torch.uint8)
    for tile, (i, j) in zip(cut, places, strict=True):
        if i >= 0:
            whole[:, 16 * i : 16 * i + 16, 16 * j : 16 * j + 16] = tile
    h, w = fit(np.array([height, width]), np.array([rows, columns]), side=16).tolist()
    top, left = (rows * 16 - h) // 2, (columns * 16 - w) // 2
    picture = PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).resize((w, h), PIL.Image.Resampling.BICUBIC)
    inside = whole[:, top : top + h, left : left + w].permute(1, 2, 0).numpy()
    assert np.abs(inside.astype(int) - np.asarray(picture)).max() <= 2
    whole[:, top : top + h, left : left + w] = 100
    assert (whole == 100).all()


def test_overview_comes_before_the_four_quarters() -> None:
    image = torch.randint(0, 256, (3, 50, 90), dtype=torch.uint8)
    tiling = Tiling("overview_and_crops", side=32)
    cut = tiles(image, grid=(2, 2), tiling=tiling, mode="squash", padding=GREY)
    picture = PIL.Image.fromarray(image.permute(1, 2, 0).numpy())
    large, small = (
        np.asarray(picture.resize((side, side), PIL.Image.Resampling.BICUBIC)).astype(int) for side in (64, 32)
    )
    expected = [small, large[:32, :32], large[:32, 32:], large[32:, :32], large[32:, 32:]]
    assert tiling.places((2, 2)).tolist() == [[-1, -1], [0, 0], [0, 1], [1, 0], [1, 1]]
    for tile, reference in zip(cut, expected, strict=True):
        assert np.abs(tile.permute(1, 2, 0).numpy() - reference).max() <= 2
