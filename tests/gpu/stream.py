"""An endless stream of batches that a small model learns in tens of steps, and that never repeats.

Each sequence is one example: an image of one of 8 shades, and then tokens of which each follows from the one before by
a fixed permutation, nine times out of ten; else it is drawn anew. The first follows from the shade. So both the decoder
and the way from the image to it can be learned, and the loss cannot fall below the entropy of the draws.
"""

import math
from collections.abc import Iterator

import torch

from megatron_mm1.config import MM1Config
from megatron_mm1.data.batch import IGNORE, ImageGroup, PackedBatch
from megatron_mm1.data.images.preprocessing import Normalization

SHADES = 8
ALPHABET = 64
"""Tokens in use."""
FAITHFUL = 0.9
"""How often the next token is the permutation's."""

_TABLE = torch.randperm(ALPHABET, generator=torch.Generator().manual_seed(0))
_FIRST_TOKEN = 4
_NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def least_loss() -> float:
    """Entropy of a token given the one before, nats: no model's loss is lower on average."""
    likely = FAITHFUL + (1 - FAITHFUL) / ALPHABET
    other = (1 - FAITHFUL) / ALPHABET
    return -(likely * math.log(likely) + (ALPHABET - 1) * other * math.log(other))


def stream(config: MM1Config, *, seed: int = 0) -> Iterator[PackedBatch]:
    """Microbatches of micro_batch_size sequences; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = config.training.micro_batch_size, config.data.seq_length
    side, per_image = config.model.vision.image_size, config.model.connector.tokens_per_image
    while True:
        shades = torch.randint(SHADES, (rows,), generator=generator)
        chain = _chains(shades, length - per_image, generator)
        tokens = torch.cat([torch.full((rows, per_image), _FIRST_TOKEN - 1), chain + _FIRST_TOKEN], dim=1)
        labels = tokens.roll(-1, dims=1)
        labels[:, : per_image - 1] = IGNORE
        labels[:, -1] = IGNORE
        levels = shades.mul(255 // (SHADES - 1)).byte()
        slots = torch.arange(rows)[:, None] * length + torch.arange(per_image)
        pixels = levels[:, None, None, None].expand(rows, 3, side, side).contiguous()
        yield PackedBatch(
            tokens=tokens,
            labels=labels,
            position_ids=torch.arange(length).expand(rows, length).contiguous(),
            segment_ids=torch.ones(rows, length, dtype=torch.int32),
            source_ids=torch.zeros(rows, length, dtype=torch.int64),
            images=(ImageGroup(slots=slots, height=side, width=side, pixels=pixels, normalization=_NORMALIZATION),),
        )


def _chains(start: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    """[rows, length] tokens 0..ALPHABET-1; the first follows from `start`."""
    rows = len(start)
    redrawn = torch.rand(rows, length, generator=generator) > FAITHFUL
    draws = torch.randint(ALPHABET, (rows, length), generator=generator)
    columns, current = [], start
    for position in range(length):
        current = torch.where(redrawn[:, position], draws[:, position], _TABLE[current])
        columns.append(current)
    return torch.stack(columns, dim=1)
