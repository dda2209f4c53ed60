"""Small things that numpy does not have."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

_AT_ONCE = 1 << 25
"""Hashes in memory, 256 MB."""


def ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """[sum(stops - starts)] int64: the numbers of each range, one range after another."""
    sizes = stops - starts
    before = np.cumsum(sizes) - sizes
    return np.arange(int(sizes.sum())) + np.repeat(starts - before, sizes)


def count_values(
    hashes: Callable[[], Iterable[np.ndarray]], total: int, *, at_once: int = _AT_ONCE
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Different values and how often each occurs, some at a time, in bounded memory.

    Args:
        hashes: starts a pass over int64 arrays; there is one for every `at_once` of the values.
        total: how many values a pass has.
    """
    passes = max(1, -(-total // at_once))
    for turn in range(passes):
        taken = [values[values % passes == turn] for values in hashes()]
        yield np.unique(np.concatenate([np.zeros(0, np.int64), *taken]), return_counts=True)
