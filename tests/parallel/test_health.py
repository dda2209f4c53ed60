"""`mm1 health` names the node that is slow or wrong, and no other."""

import itertools
import re

import pytest

from megatron_mm1.parallel.health import Rates, rounds, unfit
from tests.parallel.health_jobs import probe

LEAST_SHARE = 0.05  # delays bring a rate far below it, a busy machine's noise does not


def problems(pool, hosts, tampered):
    everyone = pool(len(hosts)).run(probe, hosts, tampered)
    assert all(nodes == everyone[0] for nodes in everyone)
    return unfit(everyone[0], least_share=LEAST_SHARE)


ALONE, SHARED = ["a", "b", "c", "d"], ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("hosts", "rank", "what", "expected"),
    [
        (ALONE, 2, "slow product", "node c is slow: .* TFLOP/s, [0-4]% of the median"),
        (ALONE, 1, "slow all-reduce", "node b is slow: .* GB/s between nodes, [0-4]% of the median"),
        (ALONE, 3, "wrong product", "node d is faulty: its results are wrong"),
        (SHARED, 2, "wrong product", "node b is faulty: its results are wrong"),
    ],
)
def test_an_unfit_node_is_named(pool, hosts, rank, what, expected):
    [problem] = problems(pool, hosts, {rank: what})
    assert re.match(expected, problem)


def test_nodes_that_are_alike_are_all_fit(pool):
    assert problems(pool, SHARED, {}) == []


@pytest.mark.parametrize("count", range(1, 8))
def test_every_node_meets_both_neighbours_one_at_a_time(count):
    nodes = [f"node{number}" for number in range(count)]
    meetings = rounds(nodes)
    for pairs in meetings:
        assert len(set(itertools.chain(*pairs))) == 2 * len(pairs)
    times = [sum(node in pair for pairs in meetings for pair in pairs) for node in nodes]
    assert times == [{1: 0, 2: 1}.get(count, 2)] * count


def test_a_rate_is_compared_with_the_median_of_the_nodes_that_have_it():
    def rates(product, inside=None):
        return Rates(product=product, inside=inside, between=None, is_right=True)

    nodes = {"a": rates(100.0, 10.0), "b": rates(98.0), "c": rates(74.0, 9.0)}
    assert unfit(nodes, least_share=0.75) == []
    assert unfit(nodes, least_share=0.76) == ["node c is slow: 74 TFLOP/s, 76% of the median 98"]
