"""The order of training: which documents each sequence holds, as a pure function of (seed, index).

The only state of a run is how many sequences it has used, so it resumes anywhere and on any number of ranks, and two
models of an ablation see the same examples in the same order [M].
"""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from megatron_mm1.data.order import hash_numbers
from megatron_mm1.data.pools import PieceOf
from megatron_mm1.errors import UserError

_ROUND = 10_000
"""Sequences over which the mixture's weights hold exactly (to 1/10,000; no stream gets fewer than one)."""


class Stream(Protocol):
    """Sequences without end (`PackedStream`)."""

    def __len__(self) -> int:
        """Sequences in one epoch."""

    def sequence(self, index: int) -> list[PieceOf]: ...

    def num_images(self, index: int) -> int: ...


@dataclass(frozen=True)
class Ingredient:
    """A stream in the mixture.

    Attributes:
        passes: how often an epoch of it visits each of its sources, by name.
        identity: with `passes`, tells its sequences from any other's; part of the plan's fingerprint.
        max_epochs: it gives no more than so many epochs in all; None: as many as it is asked for.
    """

    passes: Mapping[str, float]
    stream: Stream
    identity: Any
    max_epochs: float | None = None

    @property
    def most_sequences(self) -> float:
        return math.inf if self.max_epochs is None else int(self.max_epochs * len(self.stream))


@dataclass(frozen=True)
class Phase:
    """Shares of the ingredients from one sequence of the run on: by index of the ingredient, in sequences."""

    first: int
    weights: Mapping[int, float]


class _Segment:
    """A stretch of the run over which the quotas are the same.

    Args:
        first: its first sequence.
        used: how many sequences each ingredient has given before.
        key: chooses the order within a round.
    """

    def __init__(self, first: int, weights: Mapping[int, float], used: Mapping[int, int], *, key: str) -> None:
        self.first, self.used = first, dict(used)
        self.ingredients = np.array(list(weights), np.int64)
        self.quotas = _quotas(list(weights.values()))
        self._stream_at, self._rank_at = _spread(self.quotas, key=key)

    def locate(self, index: int) -> tuple[int, int]:
        """(ingredient, its own sequence number) of the run's sequence `index`."""
        turn, place = divmod(index - self.first, _ROUND)
        stream = self._stream_at[place]
        ingredient = int(self.ingredients[stream])
        own = turn * int(self.quotas[stream]) + int(self._rank_at[place])
        return ingredient, self.used.get(ingredient, 0) + own

    def used_at(self, index: int) -> dict[int, int]:
        """Sequences that each ingredient has given before the run's sequence `index`."""
        turn, place = divmod(index - self.first, _ROUND)
        begun = np.bincount(self._stream_at[:place], minlength=len(self.quotas))
        own = (turn * self.quotas + begun).tolist()
        return self.used | {
            ingredient: self.used.get(ingredient, 0) + count
            for ingredient, count in zip(self.ingredients.tolist(), own, strict=True)
        }

    def exhausts(self, ingredient: int, most: int) -> int:
        """The first sequence of the run for which `ingredient` would have to give more than `most` in all."""
        stream = int(np.flatnonzero(self.ingredients == ingredient)[0])
        turn, rank = divmod(most - self.used.get(ingredient, 0), int(self.quotas[stream]))
        place = np.flatnonzero((self._stream_at == stream) & (self._rank_at == rank))[0]
        return self.first + turn * _ROUND + int(place)


class Plan:
    """A mixture of streams in phases.

    Args:
        ingredients: what is mixed.
        phases: increasing; the first begins at 0. What an ingredient has given counts on from phase to phase, and a new
            phase changes nothing before it. Where an ingredient has given its most, its share goes to the others.
        seed: of the order.
        identity: of everything else that the sequences depend on; part of the fingerprint.

    Attributes:
        end: the run's number of sequences; None: without end. It ends where every ingredient has given its most.

    Raises:
        UserError: phases without an ingredient, or with weights that are negative or all 0.
    """

    def __init__(self, ingredients: Sequence[Ingredient], phases: Sequence[Phase], *, seed: int, identity: Any) -> None:
        self.ingredients = tuple(ingredients)
        self._identity = [seed, identity]
        for phase in phases:
            weights = list(phase.weights.values())
            if not weights or min(weights) < 0 or sum(weights) <= 0:
                raise UserError(f"a mixture needs sources with weights that are not negative, not all 0; got {weights}")
        if not phases or phases[0].first or any(a.first >= b.first for a, b in pairwise(phases)):
            raise UserError(f"phases must begin at 0 and increase; got {[phase.first for phase in phases]}")
        self._segments: list[_Segment] = []
        self.end: int | None = None
        self._lay_out(phases, seed)
        self._firsts = [segment.first for segment in self._segments]

    def _lay_out(self, phases: Sequence[Phase], seed: int) -> None:
        """Segments from phases: a phase is cut where an ingredient runs out."""
        for phase, following in zip(phases, [*phases[1:], None], strict=True):
            first = phase.first
            while following is None or first < following.first:
                used = self._segments[-1].used_at(first) if self._segments else {}
                weights = {
                    number: weight
                    for number, weight in phase.weights.items()
                    if weight > 0 and used.get(number, 0) < self.ingredients[number].most_sequences
                }
                if not weights:
                    self.end = first
                    return
                segment = _Segment(first, weights, used, key=f"{seed}/mixture")
                self._segments.append(segment)
                most = {number: self.ingredients[number].most_sequences for number in weights}
                out = [segment.exhausts(number, int(cap)) for number, cap in most.items() if cap < math.inf]
                if not out or (following is not None and min(out) >= following.first):
                    break
                first = min(out)

    def locate(self, index: int) -> tuple[int, int]:
        """(ingredient, its own sequence number) of the run's sequence `index`.

        Raises:
            UserError: the data ends before it.
        """
        if self.end is not None and index >= self.end:
            raise UserError(f"the data ends after {self.end:,} sequences: every source has been seen max_epochs times")
        return self._segment(index).locate(index)

    def sequence(self, index: int) -> list[PieceOf]:
        """The pieces of the run's sequence `index`."""
        ingredient, own = self.locate(index)
        return self.ingredients[ingredient].stream.sequence(own)

    def num_images(self, index: int) -> int:
        """Images (tiles) in the run's sequence `index`."""
        ingredient, own = self.locate(index)
        return self.ingredients[ingredient].stream.num_images(own)

    def used(self, consumed: int) -> list[int]:
        """Sequences that each ingredient has given when the run has used `consumed`."""
        used = self._segment(max(consumed - 1, 0)).used_at(consumed)
        return [used.get(number, 0) for number in range(len(self.ingredients))]

    def fingerprint(self, consumed: int = 0) -> str:
        """Equal where the first `consumed` sequences are equal, and what comes next up to a later phase."""
        begun = [segment for segment in self._segments if segment.first < max(consumed, 1)]
        concerned = sorted({number for segment in begun for number in segment.ingredients.tolist()})
        ingredients = [self.ingredients[number] for number in concerned]
        identity = {
            "run": self._identity,
            "ingredients": [[list(ingredient.passes.items()), ingredient.identity] for ingredient in ingredients],
            "segments": [
                [segment.first, [concerned.index(number) for number in segment.ingredients], segment.quotas.tolist()]
                for segment in begun
            ],
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def _segment(self, index: int) -> _Segment:
        return self._segments[bisect_right(self._firsts, index) - 1]


def _quotas(weights: Sequence[float]) -> np.ndarray:
    """[n] int64 sequences of each stream per round: largest remainders, at least one."""
    share = np.asarray(weights, np.float64) / np.sum(weights) * _ROUND
    quotas = np.floor(share).astype(np.int64)
    remainder = np.argsort(quotas - share, kind="stable")[: _ROUND - quotas.sum()]
    quotas[remainder] += 1
    for missing in np.flatnonzero(quotas == 0):
        quotas[missing] = 1
        quotas[np.argmax(quotas)] -= 1
    return quotas


def _spread(quotas: np.ndarray, *, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Stream at each place of a round, and how many of that stream came before it in the round.

    Each stream's sequences are spread evenly, each at a random place within its own stretch: so that no source falls
    on one data-parallel rank over and over.
    """
    stream = np.repeat(np.arange(len(quotas)), quotas)
    rank = np.concatenate([np.arange(quota) for quota in quotas])
    jitter = (hash_numbers(key, len(stream)) >> np.uint64(11)) / 2.0**53
    order = np.argsort((rank + jitter) / quotas[stream], kind="stable")
    return stream[order], rank[order]
