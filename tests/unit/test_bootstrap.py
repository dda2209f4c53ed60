"""Percentile bootstrap intervals: equal scipy's, and cover the true mean about as often as they say."""

import dataclasses

import numpy as np
import pytest
import scipy.stats

from megatron_mm1.evaluation.bootstrap import difference_interval, mean_interval

GENERATOR = np.random.default_rng(5)
SAMPLES = {
    "right or wrong": GENERATOR.integers(0, 2, 300).astype(float),
    "skewed": GENERATOR.exponential(2.0, 400),
    "few": GENERATOR.normal(10, 3, 12),
}


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize("values", SAMPLES.values(), ids=SAMPLES)
def test_interval_equals_scipy(values, confidence):
    ours = mean_interval(values, confidence=confidence)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, confidence_level=confidence, method="percentile", rng=1
    ).confidence_interval
    error = 0.06 * (theirs.high - theirs.low)  # of quantiles of 10,000 random means
    assert ours.mean == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=error)


def test_interval_of_a_weighted_mean_equals_scipy():
    """A loss per token: the weights are drawn with the values."""
    weights = GENERATOR.integers(2, 15, 200).astype(float)
    values = GENERATOR.normal(2, 1, 200) / np.sqrt(weights)

    def mean(values, weights, axis):
        return (values * weights).sum(axis=axis) / weights.sum(axis=axis)

    ours = mean_interval(values, weights=weights)
    theirs = scipy.stats.bootstrap((values, weights), mean, paired=True, method="percentile", rng=1).confidence_interval
    error = 0.06 * (theirs.high - theirs.low)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=error)


def test_coverage():
    covered = 0
    for trial in range(400):
        interval = mean_interval(np.random.default_rng(trial).exponential(1.0, 80), resamples=1000, seed=trial)
        covered += interval.low <= 1.0 <= interval.high
    assert 0.90 <= covered / 400 <= 0.98  # 0.95 asymptotically, a little less on 80 skewed values


def test_coverage_of_clustered_values():
    """Ten questions about each of 60 images: drawn one by one, the interval would be too narrow."""
    covered = {"clusters": 0, "one by one": 0}
    images = np.repeat(np.arange(60), 10)
    for trial in range(200):
        generator = np.random.default_rng(trial)
        values = generator.normal(0, 1, 60)[images] + generator.normal(0, 0.3, 600)
        for name, clusters in (("clusters", images.tolist()), ("one by one", None)):
            interval = mean_interval(values, clusters=clusters, resamples=1000, seed=trial)
            covered[name] += interval.low <= 0 <= interval.high
    assert covered["clusters"] / 200 >= 0.89
    assert covered["one by one"] / 200 <= 0.6


def test_each_value_its_own_cluster_is_no_cluster():
    values = SAMPLES["skewed"]
    assert mean_interval(values, clusters=list(range(len(values)))) == mean_interval(values)


def test_same_seed_same_interval():
    values = SAMPLES["few"]
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values) != mean_interval(values, seed=1)


def test_chunks_do_not_change_the_sample_size(monkeypatch):
    values = SAMPLES["right or wrong"]
    whole = mean_interval(values)
    monkeypatch.setattr("megatron_mm1.evaluation.bootstrap._CHUNK", 7 * len(values))
    assert mean_interval(values) == whole


def test_no_values():
    with pytest.raises(ValueError, match="no value"):
        mean_interval([])


def test_arguments_of_different_lengths():
    with pytest.raises(ValueError, match="3 values, 2 weights and 3 clusters"):
        mean_interval([1.0, 2.0, 3.0], weights=[1.0, 1.0])


def test_a_difference_is_of_the_same_items():
    """What varies from item to item, or from cluster to cluster, and is the same on both sides, does not widen it."""
    values = np.random.default_rng(0).normal(size=50)
    clusters = [index // 5 for index in range(50)]
    interval = difference_interval(values + 0.5, values, clusters=clusters)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.5, 0.5, 0.5))
    assert interval.count == 50
    unlike = difference_interval(values, np.zeros(50), clusters=clusters)
    assert dataclasses.astuple(unlike) == pytest.approx(dataclasses.astuple(mean_interval(values, clusters=clusters)))


def test_a_difference_of_weighted_means():
    """As of F1, whose weights depend on the answers: 1/2 - 3/4."""
    interval = difference_interval([1.0, 0.0], [1.0, 0.0], weights=[1, 1], other_weights=[3, 1])
    assert interval.mean == -0.25
