"""How an image of high resolution is cut into tiles, each encoded as an image of its own: pure functions of its size.

"overview_and_crops" (MM1 [P]): the image resized to twice the tower's side, as four quarters behind the whole one.
"dynamic" (MM1.5): the image resized, its proportions kept, into the grid of tiles that suits its size; the rest of the
grid is padding, and the whole image follows the tiles where there are several.

An exported model carries this file: it imports nothing of this package.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["none", "overview_and_crops", "dynamic"]
_MOST_TILED_IMAGES = 2
"""An example with more images is not tiled dynamically."""


def fit(sizes: np.ndarray, grids: np.ndarray, *, side: int) -> np.ndarray:
    """The image resized, its proportions kept, so that it just fits the grid.

    Args:
        sizes: [.., 2] int64 (height, width) of images, px.
        grids: [.., 2] int64 (rows, columns) of tiles.
        side: of a tile, px.

    Returns:
        [.., 2] int64 (height, width), px: one of them is the grid's, the other rounded (halves up), at least 1.
    """
    sizes, room = np.broadcast_arrays(np.asarray(sizes, np.int64), np.asarray(grids, np.int64) * side)
    height, width = sizes[..., 0], sizes[..., 1]
    upright = room[..., 0] * width <= room[..., 1] * height  # the height is what limits
    by_height = np.stack([room[..., 0], _rounded(width * room[..., 0], height)], axis=-1)
    by_width = np.stack([_rounded(height * room[..., 1], width), room[..., 1]], axis=-1)
    return np.where(upright[..., None], by_height, by_width)


def _rounded(dividend: np.ndarray, divisor: np.ndarray) -> np.ndarray:
    return np.maximum(1, (2 * dividend + divisor) // (2 * divisor))


@dataclass(frozen=True)
class Tiling:
    """Which tiles an image becomes.

    Attributes:
        kind: none, overview_and_crops or dynamic.
        side: of a tile, px.
        min_tiles, max_tiles: of a dynamic grid, the overview not counted.
    """

    kind: Kind = "none"
    side: int = 378
    min_tiles: int = 1
    max_tiles: int = 4

    def grids(self, sizes: np.ndarray, num_images: np.ndarray | int) -> np.ndarray:
        """The grid of each image.

        Dynamic: of the grids into which the image goes without being made smaller the one with the least padding, else
        the one in which it stays largest; then the one with the least padding, the fewest tiles, the fewest rows.

        Args:
            sizes: [n, 2] (height, width) of the images, px, at least 1.
            num_images: [n] or one for all, images of the whole document that the image belongs to.

        Returns:
            [n, 2] int64 (rows, columns).
        """
        sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
        if self.kind == "none":
            return np.ones_like(sizes)
        if self.kind == "overview_and_crops":
            return np.full_like(sizes, 2)
        best = self._best_grids(sizes)
        tiled = np.broadcast_to(np.asarray(num_images) <= _MOST_TILED_IMAGES, len(sizes))
        return np.where(tiled[:, None], best, 1)

    def _best_grids(self, sizes: np.ndarray) -> np.ndarray:
        candidates = self._candidates()
        fitted = fit(sizes[:, None], candidates[None], side=self.side)  # [n, candidates, 2]
        area = fitted.prod(axis=-1)
        padding = candidates.prod(axis=-1) * self.side**2 - area
        covers = (candidates[None] * self.side >= sizes[:, None]).all(axis=-1)
        loss = np.where(covers, 0, -area)  # those that cover lose nothing, and come first
        loss = np.where(covers.any(axis=1, keepdims=True) & ~covers, 1, loss)
        order = np.lexsort((padding, loss), axis=-1)  # stable: the order of the candidates decides the rest
        return candidates[order[:, 0]]

    def _candidates(self) -> np.ndarray:
        """[c, 2] grids of a legal number of tiles: few tiles first, then few rows."""
        rows, columns = np.mgrid[1 : self.max_tiles + 1, 1 : self.max_tiles + 1].reshape(2, -1)
        tiles = rows * columns
        order = np.lexsort((rows, tiles))
        grids = np.stack([rows, columns], axis=1)[order]
        return grids[(tiles[order] >= self.min_tiles) & (tiles[order] <= self.max_tiles)]

    def tiles_of_grids(self, grids: np.ndarray) -> np.ndarray:
        """[n] int64, encoded images (tiles and overview) of images with the given grids [n, 2]."""
        cells = np.asarray(grids, np.int64).reshape(-1, 2).prod(axis=1)
        return cells + (cells > 1)

    def tiles_of(self, sizes: np.ndarray, num_images: np.ndarray | int) -> np.ndarray:
        """[n] int64, how many encoded images each image becomes: it takes so many times tokens_per_image positions.

        Arguments as of `grids`.
        """
        return self.tiles_of_grids(self.grids(sizes, num_images))

    def places(self, grid: tuple[int, int]) -> np.ndarray:
        """[tiles, 2] int64 (row, column) of a grid's tiles in the order they are encoded; (-1, -1) is the whole."""
        cells = np.indices(grid).reshape(2, -1).T
        overview = np.full((1, 2), -1)
        if len(cells) == 1:
            return overview
        return np.concatenate([overview, cells] if self.kind == "overview_and_crops" else [cells, overview])
