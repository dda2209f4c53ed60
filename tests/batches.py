"""Packed batches made without a corpus."""

import numpy as np
import torch

from megatron_mm1.config import MM1Config
from megatron_mm1.data.batch import IGNORE, ImageGroup, PackedBatch

KINDS = ("mixed", "no image", "one rank without images", "most images", "unequal tokens", "text only")
"""What `synthetic_batches` makes: see there."""


def synthetic_batches(config: MM1Config, kind: str) -> list[PackedBatch]:
    """The microbatches of one global batch, the same on every rank.

    Args:
        config: sizes are read.
        kind: "mixed" examples of several lengths, some with images, and a padded tail; "no image" in the batch;
        images in every
            other microbatch only, so that under two-way data parallelism "one rank" is "without images"; the "most
            images" a sequence may hold in every row; "unequal tokens": every other microbatch trains a quarter of its
            positions; "text only": no image and no padding.
    """
    generator = np.random.default_rng(KINDS.index(kind))
    count = config.training.global_batch_size // config.training.micro_batch_size
    return [_microbatch(config, kind, number, generator) for number in range(count)]


def _microbatch(config: MM1Config, kind: str, number: int, generator: np.random.Generator) -> PackedBatch:
    rows, length = config.training.micro_batch_size, config.data.seq_length
    per_image, size = config.model.connector.tokens_per_image, config.model.vision.image_size
    tokens = generator.integers(10, 2000, (rows, length))
    trained = np.ones((rows, length), bool)
    segment_ids = np.zeros((rows, length), np.int32)
    position_ids = np.zeros((rows, length), np.int64)
    slots = []
    for row in range(rows):
        for segment, (start, stop, images) in enumerate(_examples(config, kind, number, generator), 1):
            segment_ids[row, start:stop] = segment
            position_ids[row, start:stop] = np.arange(stop - start)
            trained[row, stop - 1] = False
            for image in range(images):
                first = start + 1 + image * (per_image + 1)
                tokens[row, first : first + per_image] = 3
                # The last slot predicts the text behind the image.
                trained[row, first - 1 : first + per_image - 1] = False
                slots.append(row * length + np.arange(first, first + per_image))
    trained &= segment_ids > 0
    if kind == "unequal tokens" and number % 2:
        trained &= np.arange(length) % 4 == 0
    labels = np.where(trained, np.roll(tokens, -1, axis=1), IGNORE)
    images = ()
    if slots:
        pixels = torch.from_numpy(generator.standard_normal((len(slots), 3, size, size), dtype=np.float32))
        images = (ImageGroup(slots=torch.from_numpy(np.stack(slots)), height=size, width=size, pixels=pixels),)
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        segment_ids=torch.from_numpy(segment_ids),
        source_ids=torch.full((rows, length), number % max(len(config.data.sources), 1)),
        images=images,
    )


def _examples(config: MM1Config, kind: str, number: int, generator: np.random.Generator) -> list[tuple[int, int, int]]:
    """(start, stop, number of images) of each example of a sequence."""
    length, per_image = config.data.seq_length, config.model.connector.tokens_per_image
    if kind == "text only":
        return [(0, length, 0)]
    if kind == "most images":
        return [(0, length - 1, config.data.max_images_per_sequence)]
    examples, start = [], 0
    while True:
        images = int(generator.integers(0, 3))
        if kind == "no image" or (kind == "one rank without images" and number % 2):
            images = 0
        stop = start + images * (per_image + 1) + int(generator.integers(2, 40))
        if stop > length - 5:
            return examples
        examples.append((start, stop, images))
        start = stop
