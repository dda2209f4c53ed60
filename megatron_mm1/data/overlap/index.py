"""Finding the documents of the evaluation set that share a hash, or have one a few bits away."""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from megatron_mm1.data.arrays import ranges

_NONE = np.zeros(0, np.int64)


class Postings:
    """Which documents have which hash.

    Args:
        hashes: of each document: document n's are the n-th.
    """

    def __init__(self, hashes: Iterable[np.ndarray]) -> None:
        hashes = [np.asarray(some, np.uint64) for some in hashes]
        documents = np.repeat(np.arange(len(hashes)), [len(some) for some in hashes])
        values = np.concatenate([np.zeros(0, np.uint64), *hashes])
        order = np.argsort(values, kind="stable")
        self._documents = documents[order]
        self._hashes, starts = np.unique(values[order], return_index=True)
        self._starts = np.append(starts, len(values))

    def documents(self, hashes: np.ndarray) -> np.ndarray:
        """Documents with any of `hashes`, each once, in order."""
        found = _members(self._hashes, np.asarray(hashes, np.uint64))
        return np.unique(self._documents[ranges(self._starts[found], self._starts[found + 1])])


class NearPostings:
    """Which documents have a 64-bit hash within some bits of another.

    Two hashes that differ in at most `distance` bits are equal in at least one of `distance + 1` stretches of their
    bits, so that only hashes with an equal stretch are compared, and all within the distance are found.

    Args:
        hashes: of each document.
        distance: differing bits at most, below 64.
    """

    def __init__(self, hashes: Iterable[np.ndarray], *, distance: int) -> None:
        hashes = [np.asarray(some, np.uint64) for some in hashes]
        self._distance = distance
        self._documents = np.repeat(np.arange(len(hashes)), [len(some) for some in hashes])
        self._hashes = np.concatenate([np.zeros(0, np.uint64), *hashes])
        self._masks = _stretches(distance + 1)
        self._orders = [np.argsort(self._hashes & mask, kind="stable") for mask in self._masks]
        self._sorted = [(self._hashes & mask)[order] for mask, order in zip(self._masks, self._orders, strict=True)]

    def documents(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Documents near any of `hashes`, each once, in order; and the fewest differing bits of each."""
        hashes = np.asarray(hashes, np.uint64)
        documents, distances = [_NONE], [_NONE]
        for mask, order, values in zip(self._masks, self._orders, self._sorted, strict=True):
            keys = hashes & mask
            starts, stops = np.searchsorted(values, keys), np.searchsorted(values, keys, side="right")
            candidates = order[ranges(starts, stops)]
            bits = np.bitwise_count(self._hashes[candidates] ^ np.repeat(hashes, stops - starts))
            near = bits <= self._distance
            documents.append(self._documents[candidates[near]])
            distances.append(bits[near].astype(np.int64))
        return _nearest(np.concatenate(documents), np.concatenate(distances))


def _nearest(documents: np.ndarray, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each document once, with the least of its distances."""
    order = np.lexsort((distances, documents))
    documents, first = np.unique(documents[order], return_index=True)
    return documents, distances[order][first]


def _stretches(count: int) -> list[np.uint64]:
    """Masks that share the 64 bits out into `count` runs."""
    cuts = [64 * n // count for n in range(count + 1)]
    return [np.uint64((1 << stop) - (1 << start)) for start, stop in pairwise(cuts)]


def _members(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Places in the sorted `values` of those of `wanted` that are there."""
    places = np.searchsorted(values, wanted)
    inside = places < len(values)
    places = places[inside]
    return places[values[places] == wanted[inside]]
