"""Pieces of documents -> one PackedBatch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch

from megatron_mm1.config.schema import MM1Config
from megatron_mm1.data.batch import IGNORE, ImageGroup, PackedBatch
from megatron_mm1.data.image_tokens import ImageTokens
from megatron_mm1.data.images.augmentation import RandomResizedCrop
from megatron_mm1.data.images.preprocessing import EncodedImage
from megatron_mm1.data.source import Piece
from megatron_mm1.data.tokenizer import Tokenizer
from megatron_mm1.errors import UserError


@dataclass(frozen=True)
class Row:
    """One sequence to be assembled.

    Attributes:
        sources: index of each piece's source in the mixture.
        pieces: its examples in order; together they fit the sequence.
        trained: False for a row that only fills up a microbatch: none of its positions gets a label.
        grids: for each piece the grids of its images, [n, 2] (rows, columns); None where images are not tiled.
        first_images: for each piece how many images its document has before it; None: it begins its document.
        index: place of the sequence in the order of training, which decides how its images are cropped; None where
            they are not, in validation.
    """

    sources: Sequence[int]
    pieces: Sequence[Piece]
    trained: bool = True
    grids: Sequence[np.ndarray] | None = None
    first_images: Sequence[int] | None = None
    index: int | None = None


class FillsImages(Protocol):
    """Puts the pixels of images into their group; `images` in the order of the group's slots, tiled as they say."""

    def fill(self, group: ImageGroup, images: Sequence[EncodedImage]) -> ImageGroup: ...


@dataclass(frozen=True)
class Assembler:
    """Expands, labels and numbers pieces.

    Attributes:
        seq_length: S.
        image_tokens: lays out images.
        pad_id: token id.
        image_size: side of the images, px.
        text_only: leave every image and its positions out.
        processor: turns image bytes into pixels; None on ranks that do not encode.
        crop: random crops of the images of rows that have an `index`.
    """

    seq_length: int
    image_tokens: ImageTokens
    pad_id: int
    image_size: int
    text_only: bool = False
    processor: FillsImages | None = None
    crop: RandomResizedCrop | None = None

    @staticmethod
    def of(config: MM1Config, tokenizer: Tokenizer, *, processor: FillsImages | None = None) -> "Assembler":
        """That of a run; it crops no image."""
        return Assembler(
            seq_length=config.data.seq_length,
            image_tokens=ImageTokens.of(config, tokenizer),
            pad_id=tokenizer.pad_id,
            image_size=config.model.vision.image_size,
            text_only=config.data.text_only,
            processor=processor,
        )

    def __call__(self, rows: Sequence[Row]) -> PackedBatch:
        """The batch of `rows`.

        A label is the next token where that is a trained token of the same example, so the last position of an image
        predicts the text behind it. An example with a damaged image keeps its place and gets no label. The positions
        behind the last example count to its source.

        Raises:
            UserError: the pieces of a row do not fit the sequence.
        """
        shape = (len(rows), self.seq_length)
        tokens = np.full(shape, self.pad_id, np.int64)
        labels = np.full(shape, IGNORE, np.int64)
        position_ids = np.zeros(shape, np.int64)
        segment_ids = np.zeros(shape, np.int32)
        source_ids = np.zeros(shape, np.int64)
        images = _Images()
        for b, row in enumerate(rows):
            start = number = 0
            for segment, (source, piece) in enumerate(zip(row.sources, row.pieces, strict=True), 1):
                grids, first = self._grids(row, segment - 1), self._first_image(row, segment - 1)
                ids, trained = self._expand(piece, grids, first)
                stop = start + len(ids)
                self._check_fit(stop)
                tokens[b, start:stop] = ids
                if row.trained and None not in piece.images:
                    labels[b, start : max(start, stop - 1)] = np.where(trained[1:], ids[1:], IGNORE)
                position_ids[b, start:stop] = np.arange(len(ids))
                segment_ids[b, start:stop] = segment
                source_ids[b, start:] = source
                if not self.text_only:
                    images.slots.append(b * self.seq_length + start + np.flatnonzero(ids == self.image_tokens.image_id))
                    images.encoded += self._encoded(row, piece, grids=grids, number=number)
                    images.tiles += [self._tile_index(k, grid) for k, grid in enumerate(grids.tolist(), first)]
                number += len(piece.images)
                start = stop
        return PackedBatch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(position_ids),
            segment_ids=torch.from_numpy(segment_ids),
            source_ids=torch.from_numpy(source_ids),
            images=(self._group(images),) if images.encoded else (),
        )

    def _grids(self, row: Row, piece: int) -> np.ndarray:
        return np.ones((len(row.pieces[piece].images), 2), np.int64) if row.grids is None else row.grids[piece]

    def _first_image(self, row: Row, piece: int) -> int:
        return 0 if row.first_images is None else row.first_images[piece]

    def _expand(self, piece: Piece, grids: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and trained flags with each image at its full length, or gone."""
        is_image = piece.tokens == self.image_tokens.image_id
        if self.text_only:
            return piece.tokens[~is_image], piece.trained[~is_image]
        numbers = np.arange(first, first + len(grids))
        repeats = np.ones(len(piece.tokens), np.int64)
        repeats[is_image] = self.image_tokens.lengths(numbers, grids)
        ids, trained = np.repeat(piece.tokens, repeats), np.repeat(piece.trained, repeats)
        if self.image_tokens.indicators is not None and len(grids):
            of_images = [self.image_tokens.ids(k, tuple(grid)) for k, grid in enumerate(grids.tolist(), first)]
            ids[np.repeat(is_image, repeats)] = np.concatenate(of_images)
        return ids, trained

    def _check_fit(self, positions: int) -> None:
        if positions > self.seq_length:
            raise UserError(
                f"a sequence was packed with at least {positions} positions and data.seq_length is {self.seq_length}: "
                "the sizes of its images are not those it was packed by; prepare the data again"
            )

    def _encoded(self, row: Row, piece: Piece, *, grids: np.ndarray, number: int) -> list[EncodedImage]:
        """The images of a piece, whose first has `number` in its sequence."""
        crops = None
        if self.crop is not None and row.index is not None:
            crops = partial(self.crop.box, sequence=row.index)
        return [
            EncodedImage(data, (rows, columns), None if crops is None else partial(crops, image=number + k))
            for k, (data, (rows, columns)) in enumerate(zip(piece.images, grids.tolist(), strict=True))
        ]

    def _tile_index(self, image: int, grid: list[int]) -> np.ndarray:
        """[tiles, 3] (image, row, column)."""
        places = self.image_tokens.tiling.places((grid[0], grid[1]))
        return np.concatenate([np.full((len(places), 1), image), places], axis=1)

    def _group(self, images: "_Images") -> ImageGroup:
        slots = torch.from_numpy(np.concatenate(images.slots)).view(-1, self.image_tokens.tokens_per_image)
        is_tiled = self.image_tokens.tiling.kind != "none"
        tile_index = None if not is_tiled else torch.from_numpy(np.concatenate(images.tiles))
        group = ImageGroup(slots=slots, height=self.image_size, width=self.image_size, tile_index=tile_index)
        return group if self.processor is None else self.processor.fill(group, images.encoded)


@dataclass
class _Images:
    """What the rows' images add up to."""

    slots: list[np.ndarray] = field(default_factory=list)
    encoded: list[EncodedImage] = field(default_factory=list)
    tiles: list[np.ndarray] = field(default_factory=list)
