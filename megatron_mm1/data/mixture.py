"""The order of training: which documents each sequence holds, as a pure function of (seed, index).

The only state of a run is how many sequences it has used, so it resumes anywhere and on any number of ranks, and two
models of an ablation see the same examples in the same order [M].
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_mm1.data.packing import pack_best_fit, split_document
from megatron_mm1.data.source import IndexedSource, Piece
from megatron_mm1.errors import UserError

_ROUND = 10_000
"""Sequences over which the mixture's weights hold exactly (to 1/10,000; no source gets fewer than one)."""


def hash_numbers(key: str, count: int) -> np.ndarray:
    """[count] uint64, pseudo-random functions of `key` and the index (SplitMix64): no library update changes them."""
    seed = np.frombuffer(hashlib.sha256(key.encode()).digest()[:8], "<u8")[0]
    with np.errstate(over="ignore"):
        z = seed + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


@lru_cache(maxsize=32)
def permutation(key: str, count: int) -> np.ndarray:
    """[count] int64, a permutation of 0..count-1 that `key` chooses."""
    return np.argsort(hash_numbers(key, count), kind="stable")


@dataclass(frozen=True)
class PackingLimits:
    """What a sequence holds (names as in DataConfig)."""

    seq_length: int
    max_images: int
    tokens_per_image: int
    lookahead: int


class PackedSource:
    """One source cut and packed into sequences, which every epoch visits in another order.

    Args:
        name: the source's name, part of the key of its order.
        source: the prepared data.
        limits: what a sequence holds.
        seed: of the order.
    """

    def __init__(self, name: str, source: IndexedSource, *, limits: PackingLimits, seed: int) -> None:
        self.name, self.source = name, source
        self._key = f"{seed}/{name}"
        pieces, lengths, images = _cut(source, limits)
        if not len(pieces):
            raise UserError(f"data source {name!r} ({source.path}) has nothing to train on")
        order = permutation(f"{self._key}/packing", len(pieces))
        sequences = pack_best_fit(
            lengths[order],
            images[order],
            seq_length=limits.seq_length,
            max_images=limits.max_images,
            lookahead=limits.lookahead,
        )
        packed = order[np.concatenate(sequences)]
        self._pieces = pieces[packed]
        self._bounds = np.cumsum([0, *map(len, sequences)])
        self._images = np.add.reduceat(images[packed], self._bounds[:-1])

    def __len__(self) -> int:
        """Sequences in one epoch."""
        return len(self._bounds) - 1

    def sequence(self, index: int) -> list[tuple[int, int, int]]:
        """(document, start, stop) of the pieces of the source's sequence `index`, which may be epochs on."""
        sequence = self._packed(index)
        return [tuple(piece) for piece in self._pieces[self._bounds[sequence] : self._bounds[sequence + 1]].tolist()]

    def num_images(self, index: int) -> int:
        """Images in `sequence(index)`."""
        return int(self._images[self._packed(index)])

    def _packed(self, index: int) -> int:
        """Which of the packed sequences the source's order has at `index`."""
        epoch, place = divmod(index, len(self))
        return int(permutation(f"{self._key}/epoch {epoch}", len(self))[place])

    def pieces(self, index: int) -> list[Piece]:
        """The content of `sequence(index)`."""
        return [self.source.piece(*piece) for piece in self.sequence(index)]


class Plan:
    """A mixture of sources: `weights` are shares of sequences, each packed from one source."""

    def __init__(
        self, sources: Sequence[PackedSource], *, weights: Sequence[float], limits: PackingLimits, seed: int
    ) -> None:
        if not sources or min(weights) < 0 or sum(weights) <= 0:
            raise UserError(
                f"a mixture needs sources with weights that are not negative, not all 0; got {list(weights)}"
            )
        self.sources = tuple(sources)
        self._quotas = _quotas(weights)
        self._source_at, self._rank_at = _spread(self._quotas, key=f"{seed}/mixture")
        identity = {
            "seed": seed,
            "limits": vars(limits),
            "sources": [(source.name, source.source.fingerprint) for source in sources],
            "quotas": self._quotas.tolist(),
        }
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        """Equal where the sequences are equal; recorded with a run, it shows whether two runs saw the same data."""

    def locate(self, index: int) -> tuple[int, int]:
        """(source, its own sequence number) of global sequence `index`."""
        turn, place = divmod(index, _ROUND)
        source = int(self._source_at[place])
        return source, turn * int(self._quotas[source]) + int(self._rank_at[place])

    def sequence(self, index: int) -> tuple[int, list[tuple[int, int, int]]]:
        """Source of global sequence `index` and (document, start, stop) of its pieces."""
        source, own = self.locate(index)
        return source, self.sources[source].sequence(own)

    def num_images(self, index: int) -> int:
        """Images in global sequence `index`."""
        source, own = self.locate(index)
        return self.sources[source].num_images(own)


def _cut(source: IndexedSource, limits: PackingLimits) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces [n, 3] (document, start, stop) with their lengths [n] and numbers of images [n]; none is empty."""
    per_image = limits.tokens_per_image
    num_tokens, num_images, lengths = source.num_tokens, source.num_images, source.lengths(per_image)
    fits = (lengths <= limits.seq_length) & (num_images <= limits.max_images)
    whole = np.flatnonzero(fits)
    pieces_of = [np.stack([whole, np.zeros_like(whole), num_tokens[whole]], axis=1)]
    images_of = [num_images[whole]]
    for document in np.flatnonzero(~fits).tolist():
        positions = source.image_positions(document)
        stretches = split_document(
            int(num_tokens[document]),
            positions.tolist(),
            tokens_per_image=per_image,
            seq_length=limits.seq_length,
            max_images=limits.max_images,
        )
        pieces_of.append(np.array([(document, start, stop) for start, stop in stretches], np.int64))
        images_of.append(np.diff(np.searchsorted(positions, [0, *(stop for _, stop in stretches)])))
    pieces, images = np.concatenate(pieces_of), np.concatenate(images_of)
    lengths = pieces[:, 2] - pieces[:, 1] + images * (per_image - 1)
    filled = lengths > 0
    return pieces[filled], lengths[filled], images[filled]


def _quotas(weights: Sequence[float]) -> np.ndarray:
    """[n] int64 sequences of each source per round: largest remainders, at least one where the weight is not 0."""
    share = np.asarray(weights, np.float64) / np.sum(weights) * _ROUND
    quotas = np.floor(share).astype(np.int64)
    remainder = np.argsort(quotas - share, kind="stable")[: _ROUND - quotas.sum()]
    quotas[remainder] += 1
    for missing in np.flatnonzero((quotas == 0) & (share > 0)):
        quotas[missing] = 1
        quotas[np.argmax(quotas)] -= 1
    return quotas


def _spread(quotas: np.ndarray, *, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Source at each place of a round, and how many of that source came before it in the round.

    Each source's sequences are spread evenly, each at a random place within its own stretch: so that no source falls
    on one data-parallel rank over and over.
    """
    source = np.repeat(np.arange(len(quotas)), quotas)
    rank = np.concatenate([np.arange(quota) for quota in quotas])
    jitter = (hash_numbers(key, len(source)) >> np.uint64(11)) / 2.0**53
    order = np.argsort((rank + jitter) / quotas[source], kind="stable")
    return source[order], rank[order]
