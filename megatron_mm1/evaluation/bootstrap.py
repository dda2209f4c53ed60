"""Confidence intervals by resampling."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

_CHUNK = 1 << 22
"""Drawn indices held at a time."""


@dataclass(frozen=True)
class Interval:
    """A weighted mean and its confidence interval.

    Attributes:
        mean: over all values.
        low, high: percentile bootstrap interval; both the mean where there is a single cluster to resample.
        count: values.
    """

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(
    values: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The weighted mean of `values` with a percentile bootstrap interval (Efron); 0 where no value has any weight.

    Args:
        weights: None: all equal.
        clusters: values of one cluster (questions about one image, say) are not independent, so they are drawn
            together; None: each value is drawn on its own.

    Raises:
        ValueError: there is no value, or the arguments differ in length.
    """
    count = len(values)
    if not count:
        raise ValueError("no value to average")
    weight = np.ones(count) if weights is None else np.asarray(weights, float)
    members = np.arange(count) if clusters is None else _numbered(clusters)
    if not count == len(weight) == len(members):
        raise ValueError(f"{count} values, {len(weight)} weights and {len(members)} clusters")
    totals = np.bincount(members, weights=weight * np.asarray(values, float))
    shares = np.bincount(members, weights=weight)
    means = _resampled_means(totals, shares, resamples=resamples, generator=np.random.default_rng(seed))
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    [mean] = _ratio(totals.sum(keepdims=True), shares.sum(keepdims=True))
    return Interval(mean=float(mean), low=float(low), high=float(high), count=count)


def _numbered(clusters: Sequence[Hashable]) -> np.ndarray:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])


def _resampled_means(
    totals: np.ndarray, shares: np.ndarray, *, resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """[resamples] means of clusters drawn with replacement."""
    size = len(totals)
    means = np.empty(resamples)
    step = max(1, _CHUNK // size)
    for start in range(0, resamples, step):
        drawn = generator.integers(size, size=(min(step, resamples - start), size))
        means[start : start + len(drawn)] = _ratio(totals[drawn].sum(axis=1), shares[drawn].sum(axis=1))
    return means


def _ratio(totals: np.ndarray, shares: np.ndarray) -> np.ndarray:
    return np.divide(totals, shares, out=np.zeros_like(totals), where=shares > 0)
