"""What an image becomes among the tokens of its example: the slots of its tiles, and text that says where they lie."""

from dataclasses import dataclass, field

import numpy as np

from megatron_mm1.config.schema import MM1Config
from megatron_mm1.data.tiling import Tiling
from megatron_mm1.data.tokenizer import Tokenizer


def tiling_of(config: MM1Config) -> Tiling:
    """The tiles that a model's images become."""
    data = config.data
    return Tiling(
        data.image_tiling,
        side=config.model.vision.image_size,
        min_tiles=data.min_image_tiles,
        max_tiles=data.max_image_tiles,
    )


@dataclass(frozen=True)
class ImageTokens:
    """Lays out images: training, its planning and prompts go by the same rules.

    Attributes:
        image_id: token that a slot holds.
        tokens_per_image: slots of an image, and of each of its tiles.
        tiling: how an image becomes tiles.
        indicators: tokenizes the text "(k,i,j)" in front of each tile of an image that has several (MM1.5): image k of
            the example, counted from 0, row i and column j of the tile, counted from 1; i and j are 0 for the whole
            image. None: no text.
    """

    image_id: int
    tokens_per_image: int
    tiling: Tiling = field(default_factory=Tiling)
    indicators: Tokenizer | None = None

    @staticmethod
    def of(config: MM1Config, tokenizer: Tokenizer) -> "ImageTokens":
        return ImageTokens(
            image_id=tokenizer.image_id,
            tokens_per_image=config.model.connector.tokens_per_image,
            tiling=tiling_of(config),
            indicators=tokenizer if config.data.tile_indicators else None,
        )

    def ids(self, number: int, grid: tuple[int, int]) -> np.ndarray:
        """[positions] int64, the tokens of image `number` of an example, tile by tile."""
        places = self.tiling.places(grid)
        slots = [self.image_id] * self.tokens_per_image
        if self.indicators is None or len(places) == 1:
            return np.array(slots * len(places), np.int64)
        texts = [f"({number},{row + 1},{column + 1})" for row, column in places.tolist()]
        return np.array([token for text in self.indicators.encode_batch(texts) for token in [*text, *slots]], np.int64)

    def lengths(self, numbers: np.ndarray, grids: np.ndarray) -> np.ndarray:
        """[n] int64, positions of images `numbers` [n] of their examples with `grids` [n, 2]."""
        if self.indicators is None:
            return self.tiling.tiles_of_grids(grids) * self.tokens_per_image
        kinds, kind = np.unique(np.column_stack([numbers, grids]), axis=0, return_inverse=True)
        of_kind = [len(self.ids(number, (rows, columns))) for number, rows, columns in kinds.tolist()]
        return np.array(of_kind, np.int64)[kind.reshape(-1)]

    def costs(self, sizes: np.ndarray, num_images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the images of documents take of a sequence.

        Args:
            sizes: [I, 2] (height, width) of all images of the documents, px, document by document.
            num_images: [D] how many each document has.

        Returns:
            [I] int64 tiles, and [I] int64 positions.
        """
        grids = self.tiling.grids(sizes, np.repeat(num_images, num_images))
        firsts = np.cumsum(num_images) - num_images
        numbers = np.arange(len(grids)) - np.repeat(firsts, num_images)
        return self.tiling.tiles_of_grids(grids), self.lengths(numbers, grids)
