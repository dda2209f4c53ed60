"""Packed batches made without a corpus, of the kinds that parallel multimodal training gets wrong."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatron_mm1.config import MM1Config
from megatron_mm1.data.batch import IGNORE, ImageGroup, PackedBatch

KINDS = {
    "mixed": "examples of several lengths, some with images, and a padded tail",
    "no image": "not one in the whole batch",
    "ranks without images": "images in every other microbatch only, so that half of the data-parallel ranks have none",
    "most images": "as many as a sequence may hold, in every sequence; five are the tiles of one image",
    "two resolutions": "images of two sizes in every sequence",
    "images at both ends": "a sequence that begins with an image and ends with one",
    "one-token examples": "among longer ones",
    "one example": "fills its sequence, with images in every other microbatch",
    "padding": "most of the first sequence of a microbatch and all of the last",
    "unequal tokens": "every other microbatch trains a quarter of its positions",
}
"""What `synthetic_batches` makes."""


@dataclass(frozen=True)
class _Example:
    """Positions [start, stop) of a sequence; `images`: (first position, size) of each image."""

    start: int
    stop: int
    images: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class _Size:
    """A size of image and the tokens it takes."""

    height: int
    width: int
    tokens: int


def synthetic_batches(config: MM1Config, kind: str) -> list[PackedBatch]:
    """The microbatches of one global batch, the same on every rank.

    Args:
        config: sizes are read.
        kind: one of KINDS.
    """
    generator = np.random.default_rng(list(KINDS).index(kind))
    count = config.training.global_batch_size // config.training.micro_batch_size
    return [_microbatch(config, kind, number, generator) for number in range(count)]


def _microbatch(config: MM1Config, kind: str, number: int, generator: np.random.Generator) -> PackedBatch:
    rows, length = config.training.micro_batch_size, config.data.seq_length
    sizes = _sizes(config)
    tokens = generator.integers(10, min(2000, config.model.decoder.vocab_size), (rows, length))
    is_slot, follows = np.zeros((rows, length), bool), np.zeros((rows, length), bool)
    segment_ids, position_ids = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int64)
    slots: list[list[np.ndarray]] = [[] for _ in sizes]
    for row in range(rows):
        for segment, example in enumerate(_examples(config, kind, number, row, sizes, generator), 1):
            start, stop = example.start, example.stop
            segment_ids[row, start:stop] = segment
            position_ids[row, start:stop] = np.arange(stop - start)
            follows[row, start : stop - 1] = True
            for first, size in example.images:
                is_slot[row, first : first + sizes[size].tokens] = True
                slots[size].append(row * length + np.arange(first, first + sizes[size].tokens))
    tokens[is_slot] = 3
    # A position is trained where the next one is text of its example: an image's last slot predicts what follows it.
    trained = follows & ~np.roll(is_slot, -1, axis=1)
    if kind == "unequal tokens" and number % 2:
        trained &= np.arange(length) % 4 == 0
    images = []
    for kind_of_image, places in zip(sizes, slots, strict=True):
        if places:
            height, width = kind_of_image.height, kind_of_image.width
            pixels = generator.standard_normal((len(places), 3, height, width), dtype=np.float32)
            images.append(
                ImageGroup(
                    slots=torch.from_numpy(np.stack(places)),
                    height=height,
                    width=width,
                    pixels=torch.from_numpy(pixels),
                )
            )
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(np.where(trained, np.roll(tokens, -1, axis=1), IGNORE)),
        position_ids=torch.from_numpy(position_ids),
        segment_ids=torch.from_numpy(segment_ids),
        source_ids=torch.full((rows, length), number % max(len(config.data.sources), 1)),
        images=tuple(images),
    )


def _sizes(config: MM1Config) -> tuple[_Size, _Size]:
    """The configured size of image, and one that is wider than high."""
    vision, connector = config.model.vision, config.model.connector
    side, patch = vision.image_size, vision.patch_size
    height, width = max(side - patch, patch), side + patch
    tokens = connector.tokens_per_image
    if connector.connector == "mlp":  # keeps every patch
        tokens = (height // patch) * (width // patch)
    return _Size(side, side, connector.tokens_per_image), _Size(height, width, tokens)


def _examples(
    config: MM1Config,
    kind: str,
    number: int,
    row: int,
    sizes: tuple[_Size, _Size],
    generator: np.random.Generator,
) -> list[_Example]:
    """The examples of a sequence."""
    length, most, per_image = config.data.seq_length, config.data.max_images_per_sequence, sizes[0].tokens
    match kind:
        case "most images":
            fitting = min(most, (length - 1) // (per_image + 1))
            return [_with_images(0, length - 1, [0] * fitting, sizes, tiles=5)]
        case "one example":
            return [_with_images(0, length, [] if number % 2 else [0, 0], sizes)]
        case "images at both ends":
            middle = length // 2
            return [
                _Example(0, middle, ((0, 0),)),
                _Example(middle, length, ((length - per_image, 0),)),
            ]
        case "padding":
            last = config.training.micro_batch_size - 1
            return [] if row == last > 0 else [_with_images(0, per_image + 8, [0], sizes)]
        case "one-token examples":
            ones = [_Example(start, start + 1) for start in range(6)]
            return [*ones, *_random_examples(kind, number, 6, length, sizes, generator)]
    return list(_random_examples(kind, number, 0, length, sizes, generator))


def _random_examples(
    kind: str, number: int, start: int, length: int, sizes: tuple[_Size, _Size], generator: np.random.Generator
) -> Iterator[_Example]:
    while True:
        images = [0] * int(generator.integers(0, 3))
        if kind == "no image" or (kind == "ranks without images" and number % 2):
            images = []
        if kind == "two resolutions":
            images = [1, 0]
        taken = sum(sizes[size].tokens + 1 for size in images)
        stop = start + taken + int(generator.integers(2, 40))
        if stop > length - 5:
            return
        yield _with_images(start, stop, images, sizes)
        start = stop


def _with_images(start: int, stop: int, images: list[int], sizes: tuple[_Size, _Size], *, tiles: int = 1) -> _Example:
    """An example whose images, of these sizes, follow each other with a token of text before each, but for the first
    so many, the tiles of one image, which it stands before.
    """
    placed, position = [], start
    for number, size in enumerate(images):
        position += not 0 < number < tiles
        placed.append((position, size))
        position += sizes[size].tokens
    return _Example(start, stop, tuple(placed))
