"""Pieces of documents -> one PackedBatch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_mm1.data.batch import IGNORE, ImageGroup, PackedBatch
from megatron_mm1.data.images import ImageProcessor
from megatron_mm1.data.source import Piece


@dataclass(frozen=True)
class Row:
    """One sequence to be assembled.

    Attributes:
        source: index of the source in the mixture.
        pieces: its examples in order; together they fit the sequence.
        trained: False for a row that only fills up a microbatch: none of its positions gets a label.
    """

    source: int
    pieces: Sequence[Piece]
    trained: bool = True


@dataclass(frozen=True)
class Assembler:
    """Expands, labels and numbers pieces.

    Attributes:
        seq_length: S.
        tokens_per_image: positions of an image.
        image_id, pad_id: token ids.
        image_size: side of the images, px.
        text_only: leave every image and its positions out.
        processor: turns image bytes into pixels; None on ranks that do not encode.
    """

    seq_length: int
    tokens_per_image: int
    image_id: int
    pad_id: int
    image_size: int
    text_only: bool = False
    processor: ImageProcessor | None = None

    def __call__(self, rows: Sequence[Row]) -> PackedBatch:
        """The batch of `rows`.

        A label is the next token where that is a trained token of the same example, so the last position of an image
        predicts the text behind it. An example with an image that cannot be decoded keeps its place and gets no label.
        """
        shape = (len(rows), self.seq_length)
        tokens = np.full(shape, self.pad_id, np.int64)
        labels = np.full(shape, IGNORE, np.int64)
        position_ids = np.zeros(shape, np.int64)
        segment_ids = np.zeros(shape, np.int32)
        slots: list[np.ndarray] = []
        encoded: list[bytes] = []
        owner: list[tuple[int, int]] = []
        for b, row in enumerate(rows):
            start = 0
            for segment, piece in enumerate(row.pieces, 1):
                ids, trained = self._expand(piece)
                stop = start + len(ids)
                tokens[b, start:stop] = ids
                if row.trained:
                    labels[b, start : max(start, stop - 1)] = np.where(trained[1:], ids[1:], IGNORE)
                position_ids[b, start:stop] = np.arange(len(ids))
                segment_ids[b, start:stop] = segment
                if not self.text_only:
                    slots.append(b * self.seq_length + start + np.flatnonzero(ids == self.image_id))
                    encoded += piece.images
                    owner += [(b, segment)] * len(piece.images)
                start = stop
        images: tuple[ImageGroup, ...] = ()
        if encoded:
            pixels = None
            if self.processor is not None:
                pixels, decoded = self.processor(encoded)
                for (b, segment), usable in zip(owner, decoded, strict=True):
                    if not usable:
                        labels[b, segment_ids[b] == segment] = IGNORE
            flat = torch.from_numpy(np.concatenate(slots)).view(len(encoded), self.tokens_per_image)
            images = (ImageGroup(slots=flat, height=self.image_size, width=self.image_size, pixels=pixels),)
        source_ids = np.repeat(np.array([[row.source] for row in rows], np.int64), self.seq_length, axis=1)
        return PackedBatch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(position_ids),
            segment_ids=torch.from_numpy(segment_ids),
            source_ids=torch.from_numpy(source_ids),
            images=images,
        )

    def _expand(self, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and trained flags with each image at its full length, or gone."""
        per_image = 0 if self.text_only else self.tokens_per_image
        repeats = np.where(piece.tokens == self.image_id, per_image, 1)
        return np.repeat(piece.tokens, repeats), np.repeat(piece.trained, repeats)
