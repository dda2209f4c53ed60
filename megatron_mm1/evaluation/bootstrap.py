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
        mean: over all values; or the difference of two.
        low, high: percentile bootstrap interval; both the mean where there is a single cluster to resample.
        count: values.
    """

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def percent(self) -> str:
        """For tables in which fractions are multiplied by 100."""
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


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
    sample = _Sample.of(values, weights, clusters)
    means = sample.resampled(resamples, np.random.default_rng(seed))
    return _interval(sample.mean, means, confidence=confidence, count=len(values))


def difference_interval(
    values: Sequence[float],
    others: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    other_weights: Sequence[float] | None = None,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean of `values` less that of `others`, which are of the same items: both are resampled together.

    Args, Raises:
        As `mean_interval`.
    """
    samples = _Sample.of(values, weights, clusters), _Sample.of(others, other_weights, clusters)
    means, other_means = (sample.resampled(resamples, np.random.default_rng(seed)) for sample in samples)
    difference = samples[0].mean - samples[1].mean
    return _interval(difference, means - other_means, confidence=confidence, count=len(values))


@dataclass(frozen=True)
class _Sample:
    """Values by cluster.

    Attributes:
        totals, shares: [clusters] sums of weighted values, and of weights.
    """

    totals: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(
        cls, values: Sequence[float], weights: Sequence[float] | None, clusters: Sequence[Hashable] | None
    ) -> "_Sample":
        count = len(values)
        if not count:
            raise ValueError("no value to average")
        weight = np.ones(count) if weights is None else np.asarray(weights, float)
        members = np.arange(count) if clusters is None else _numbered(clusters)
        if not count == len(weight) == len(members):
            raise ValueError(f"{count} values, {len(weight)} weights and {len(members)} clusters")
        return cls(np.bincount(members, weights=weight * np.asarray(values, float)), np.bincount(members, weight))

    @property
    def mean(self) -> float:
        [mean] = _ratio(self.totals.sum(keepdims=True), self.shares.sum(keepdims=True))
        return float(mean)

    def resampled(self, resamples: int, generator: np.random.Generator) -> np.ndarray:
        """[resamples] means of clusters drawn with replacement; the same clusters for a generator in the same state."""
        size = len(self.totals)
        means = np.empty(resamples)
        step = max(1, _CHUNK // size)
        for start in range(0, resamples, step):
            drawn = generator.integers(size, size=(min(step, resamples - start), size))
            means[start : start + len(drawn)] = _ratio(self.totals[drawn].sum(axis=1), self.shares[drawn].sum(axis=1))
        return means


def _interval(mean: float, means: np.ndarray, *, confidence: float, count: int) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean=mean, low=float(low), high=float(high), count=count)


def _numbered(clusters: Sequence[Hashable]) -> np.ndarray:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])


def _ratio(totals: np.ndarray, shares: np.ndarray) -> np.ndarray:
    return np.divide(totals, shares, out=np.zeros_like(totals), where=shares > 0)
