"""Random orders that are pure functions of a key: no state, no memory in proportion to what they order, the same with
every version of every library.
"""

import hashlib

import numpy as np

_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(word) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_ROUNDS = 4


def _seed(key: str) -> np.uint64:
    return np.frombuffer(hashlib.sha256(key.encode()).digest()[:8], "<u8")[0]


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer."""
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def hash_numbers(key: str, count: int) -> np.ndarray:
    """[count] uint64, pseudo-random functions of `key` and the index (SplitMix64)."""
    with np.errstate(over="ignore"):
        return _mix(_seed(key) + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)


def permutation(key: str, count: int) -> np.ndarray:
    """[count] int64, a permutation of 0..count-1 that `key` chooses."""
    return np.argsort(hash_numbers(key, count), kind="stable")


class KeyedPermutation:
    """A permutation of 0..size-1 that is computed where it is asked for: a Feistel network over the next power of four,
    walked until it lands inside.

    Args:
        key: chooses the permutation.
        size: at least 1.
    """

    def __init__(self, key: str, size: int) -> None:
        self.size = size
        self._half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
        self._keys = hash_numbers(key, _ROUNDS)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at `places` (int64, each in 0..size-1), as int64."""
        values = self._network(np.asarray(places).astype(np.uint64))
        while (outside := np.flatnonzero(values >= self.size)).size:
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        mask = np.uint64((1 << int(self._half)) - 1)
        left, right = values >> self._half, values & mask
        with np.errstate(over="ignore"):
            for key in self._keys:
                left, right = right, left ^ (_mix(right * _GOLDEN + key) & mask)
        return (left << self._half) | right
