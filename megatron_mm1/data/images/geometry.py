"""RGB pixels -> squares of one size: the whole image squashed or padded, its centre, or its tiles. All in uint8.

torch's antialiased uint8 bicubic agrees with Pillow's to 2 of 255, where DALI's own does not, and is faster than both.
An exported model carries this file: of this package it imports `megatron_mm1.data.tiling` alone.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from megatron_mm1.data.tiling import Tiling, fit

Resize = Literal["squash", "shorter_side_crop", "pad"]
_LONGEST = 32
"""Length over breadth from which only the part of an image that is kept gets resized: 1 px by 10,000 px would become
gigabytes."""


def mean_colour(mean: Sequence[float]) -> Tensor:
    """[3, 1, 1] float32 in 0..255, whole numbers as LLaVA rounds: what is around images that are padded."""
    return torch.tensor([float(int(255 * value)) for value in mean]).view(3, 1, 1)


def resize(image: Tensor, *, height: int, width: int) -> Tensor:
    """[3, H, W] uint8 or float32 in 0..255 -> [3, height, width], bicubic and antialiased.

    uint8 is resized in uint8 on the CPU; float32, on any device, is rounded and clamped to the same range.
    """
    floats = image.is_floating_point()
    if image.shape[1:] == (height, width):
        return image
    # torch's uint8 kernel gives Pillow's pixels for channels last only, and resizes the width before the height.
    batch = image[None].contiguous(memory_format=torch.contiguous_format if floats else torch.channels_last)
    sizes = [(height, width)]
    if _height_first(*image.shape[1:], height=height, width=width):
        sizes.insert(0, (height, image.shape[2]))
    elif floats:
        sizes.insert(0, (image.shape[1], width))
    for size in sizes:
        batch = _float_pass(batch, size) if floats else _bicubic(batch, size)
    return batch[0]


def _bicubic(batch: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(batch, size=size, mode="bicubic", antialias=True)


def _float_pass(batch: Tensor, size: tuple[int, int]) -> Tensor:
    """One of the two passes, with its result as uint8 would have it."""
    if batch.shape[3] == size[1] == 1:  # torch gets the height of a single column wrong, of two equal ones right
        return _float_pass(batch.expand(-1, -1, -1, 2), (size[0], 2))[..., :1]
    return _bicubic(batch, size).round_().clamp_(0, 255)


def _height_first(old_height: int, old_width: int, *, height: int, width: int) -> bool:
    """Whether Pillow 13 resizes the height before the width.

    Between the two what overshoots is clamped to 0..255, so the order shows at sharp edges, by 20 of 255 and more.
    """
    return height < old_height and old_height - height > 2 * (old_width - width)


def square(image: Tensor, *, side: int, mode: Resize, padding: Tensor) -> Tensor:
    """[3, H, W] -> [3, side, side].

    Args:
        mode: "squash" resizes the whole image; "shorter_side_crop" resizes the shorter side and takes the centre, with
            the sizes and anchors of OpenAI's CLIP (torchvision's Resize and CenterCrop); "pad" puts it in the middle of
            a square of its longer side, as LLaVA-1.5 does, and resizes that.
        padding: [3, 1, 1], the colour around a padded image.
    """
    if mode == "squash":
        return resize(image, height=side, width=side)
    height, width = image.shape[1:]
    short, long = sorted((height, width))
    if mode == "pad":
        if long > _LONGEST * short:
            return padded(image, grid=(1, 1), side=side, padding=padding)
        return resize(_in_the_middle(image, height=long, width=long, padding=padding), height=side, width=side)
    if long > _LONGEST * short:
        return _resized_window(image, side=side)
    length = int(side * long / short)
    size = (length, side) if height > width else (side, length)
    top, left = (round((extent - side) / 2) for extent in size)  # halves to even, as torchvision rounds
    return resize(image, height=size[0], width=size[1])[:, top : top + side, left : left + side]


def _resized_window(image: Tensor, *, side: int) -> Tensor:
    """The centre square of a very long image, resized: as resizing all of it, except that nothing outside counts."""
    height, width = image.shape[1:]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    return resize(image[:, top : top + short, left : left + short], height=side, width=side)


def tiles(image: Tensor, *, grid: tuple[int, int], tiling: Tiling, mode: Resize, padding: Tensor) -> Tensor:
    """[3, H, W] -> [tiles, 3, side, side] in the order of `tiling.places(grid)`.

    Args:
        padding: [3, 1, 1], the colour around an image that does not fill its grid or square.
    """
    side = tiling.side
    if tiling.kind != "dynamic":
        overview = square(image, side=side, mode=mode, padding=padding)
        if grid == (1, 1):
            return overview[None]
        return torch.cat([overview[None], _cells(square(image, side=2 * side, mode=mode, padding=padding), side=side)])
    overview = padded(image, grid=(1, 1), side=side, padding=padding)
    if grid == (1, 1):
        return overview[None]
    return torch.cat([_cells(padded(image, grid=grid, side=side, padding=padding), side=side), overview[None]])


def padded(image: Tensor, *, grid: tuple[int, int], side: int, padding: Tensor) -> Tensor:
    """[3, H, W] -> [3, rows * side, columns * side]: resized to fit, in the middle of `padding`."""
    rows, columns = grid
    height, width = fit(np.array(image.shape[1:]), np.array(grid), side=side).tolist()
    resized = resize(image, height=height, width=width)
    return _in_the_middle(resized, height=rows * side, width=columns * side, padding=padding)


def _in_the_middle(image: Tensor, *, height: int, width: int, padding: Tensor) -> Tensor:
    """[3, H, W] -> [3, height, width], at least as large; an odd row or column of padding is below or on the right."""
    canvas = padding.to(image.dtype).expand(3, height, width).clone()
    top, left = (height - image.shape[1]) // 2, (width - image.shape[2]) // 2
    canvas[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return canvas


def _cells(image: Tensor, *, side: int) -> Tensor:
    """[3, rows * side, columns * side] -> [rows * columns, 3, side, side], row by row."""
    return image.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)
