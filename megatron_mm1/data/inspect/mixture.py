"""What a run's mixture comes to: shares of sequences, tokens and examples, and how full its sequences are."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_mm1.config.batch_sizes import BatchSizes
from megatron_mm1.config.schema import MM1Config
from megatron_mm1.data.plan import Sources, TrainingData, packing_limits
from megatron_mm1.data.pools import PackingLimits, PieceOf


@dataclass
class Realised:
    """What one source gives to a stretch of the run.

    Attributes:
        sequences: those that hold a document of it.
        positions: filled ones, of text and images.
        examples: documents; one that is cut counts where it begins.
        tiles: images, or tiles of them.
        fills: of each of its sequences, the shares of positions and of images that are filled, by all sources.
    """

    sequences: int = 0
    positions: int = 0
    examples: int = 0
    tiles: int = 0
    fills: list[tuple[float, float]] = field(default_factory=list)


def realised_mixture(config: MM1Config, data: TrainingData, indices: Sequence[int]) -> list[Realised]:
    """By source, over the run's sequences `indices`."""
    limits = packing_limits(config, data.sources.tokenizer)
    realised = [Realised() for _ in range(len(data.sources))]
    for index in indices:
        pieces = data.plan.sequence(index)
        costs = [cost(data.sources, limits, piece, text_only=config.data.text_only) for piece in pieces]
        positions, tiles = (sum(column) for column in zip(*costs, strict=True))
        fill = positions / limits.seq_length, tiles / max(1, limits.max_images)
        for source in {piece.source for piece in pieces}:
            realised[source].sequences += 1
            realised[source].fills.append(fill)
        for piece, (length, images) in zip(pieces, costs, strict=True):
            of = realised[piece.source]
            of.positions += length
            of.tiles += images
            of.examples += piece.start == 0
    return realised


def cost(sources: Sources, limits: PackingLimits, piece: PieceOf, *, text_only: bool) -> tuple[int, int]:
    """Positions and images (tiles) that a piece takes in its sequence; with `text_only`, no image takes any."""
    positions, sizes = sources[piece.source].images_of(np.array([piece.document]))
    inside = (positions >= piece.start) & (positions < piece.stop)
    text = piece.stop - piece.start - int(inside.sum())
    if text_only:
        return text, 0
    tiles, taken = limits.of_images(sizes, np.array([len(sizes)]))
    return text + int(taken[inside].sum()), int(tiles[inside].sum())


def mixture_table(config: MM1Config, data: TrainingData, *, num_sequences: int) -> list[str]:
    """Lines: the realised mixture of the first sequences of every phase, and the epochs of the whole run."""
    batches, steps = BatchSizes.of(config.training), config.training.train_iters
    starts = [0, *(phase.step for phase in config.data.curriculum if phase.step < steps)]
    lines = []
    for start, end in zip(starts, [*starts[1:], steps], strict=True):
        first = batches.sequences_before(start)
        indices = range(first, min(first + num_sequences, batches.sequences_before(end)))
        lines.append(f"from step {start:,}, over {len(indices):,} sequences:")
        lines += _phase_table(data, realised_mixture(config, data, indices))
    lines.append(f"over the whole run of {steps:,} steps:")
    epochs = data.epochs(batches.sequences_before(steps))
    lines += [f"  {name:<16} {value:>9.3f} epochs" for name, value in epochs.items()]
    lines += [f"  {sentence}" for sentence in data.long_documents()]
    return lines


def _phase_table(data: TrainingData, realised: Sequence[Realised]) -> list[str]:
    titles = ("sequences", "tokens", "examples", "token fill", "image fill", "larger of both")
    lines = [f"  {'':<16} " + " ".join(f"{title:>14}" for title in titles)]
    for name, of in zip(data.sources.names, realised, strict=True):
        shares = [
            getattr(of, unit) / max(1, sum(getattr(other, unit) for other in realised))
            for unit in ("sequences", "positions", "examples")
        ]
        fills = np.array(of.fills).reshape(-1, 2)
        means = [*fills.mean(axis=0), fills.max(axis=1).mean()] if len(fills) else [0.0] * 3
        lines.append(f"  {name:<16} " + " ".join(f"{value:>14.1%}" for value in [*shares, *means]))
    return lines
