"""The order of the mixture: shares, phases, caps, and what the fingerprint tells apart."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm1.data.mixture import Ingredient, Phase, Plan
from megatron_mm1.data.pools import PieceOf
from megatron_mm1.errors import UserError


class Numbered:
    """A stream whose sequences hold their own number."""

    def __init__(self, size: int = 100) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def sequence(self, index: int) -> list[PieceOf]:
        return [PieceOf(0, index, 0, 1)]

    def num_images(self, index: int) -> int:
        return index % 7


def ingredients(*caps: float | None, size: int = 100) -> list[Ingredient]:
    return [Ingredient({str(n): 1.0}, Numbered(size), f"source {n}", max_epochs=cap) for n, cap in enumerate(caps)]


def plan(weights: list[float], *, seed: int = 0, caps: list[float | None] | None = None, **later: list[float]) -> Plan:
    """Weights from the start, and from sequences named as `at_12=[..]`."""
    phases = [Phase(0, dict(enumerate(weights)))]
    phases += [Phase(int(name.removeprefix("at_")), dict(enumerate(of))) for name, of in later.items()]
    return Plan(ingredients(*(caps or [None] * len(weights))), phases, seed=seed, identity="limits")


def taken(mixture: Plan, first: int, stop: int) -> Counter[int]:
    return Counter(mixture.locate(index)[0] for index in range(first, stop))


@pytest.mark.parametrize("weights", [[0.45, 0.45, 0.1], [1.0], [3, 1], [0.5, 0.10, 0.40], [1, 0, 1]])
@pytest.mark.parametrize("first", [0, 10_000, 123_456])
def test_weights_are_shares_of_sequences(weights: list[float], first: int) -> None:
    counts = taken(plan(weights), first, first + 1000)
    for source, weight in enumerate(weights):
        assert counts[source] == pytest.approx(1000 * weight / sum(weights), abs=5)


def own_orders(mixture: Plan, count: int) -> dict[int, list[int]]:
    own: dict[int, list[int]] = {}
    for index in range(count):
        number, place = mixture.locate(index)
        own.setdefault(number, []).append(place)
    return own


shares = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=3, max_size=3).filter(any)


@settings(max_examples=30)
@given(
    shares,
    st.lists(st.tuples(st.integers(1, 12_000), shares), max_size=3, unique_by=lambda phase: phase[0]),
    st.lists(st.sampled_from([None, 0.5, 2.0, 37.13]), min_size=3, max_size=3),
)
def test_each_source_is_used_in_its_own_order_without_gaps(
    first: list[float], later: list[tuple[int, list[float]]], caps: list[float | None]
) -> None:
    mixture = plan(first, caps=caps, **{f"at_{start}": weights for start, weights in sorted(later)})
    count = min(12_000, mixture.end if mixture.end is not None else 12_000)
    own = own_orders(mixture, count)
    for source, places in own.items():
        assert places == list(range(len(places)))
        if caps[source] is not None:
            assert len(places) <= caps[source] * 100
    assert mixture.used(count) == [len(own.get(source, [])) for source in range(3)]


def test_a_source_that_runs_out_leaves_its_share_to_the_others() -> None:
    mixture = plan([0.5, 0.25, 0.25], caps=[2.0, None, None])
    assert taken(mixture, 0, 399)[0] == pytest.approx(200, abs=2)
    assert mixture.used(5000)[0] == 200
    later = taken(mixture, 1000, 2000)
    assert later[0] == 0
    assert later[1] == pytest.approx(500, abs=5)


def test_data_that_runs_out_altogether_is_an_error_at_the_very_sequence() -> None:
    mixture = plan([0.5, 0.5], caps=[2.0, 1.5])
    assert mixture.end == 350
    assert taken(mixture, 0, 350) == {0: 200, 1: 150}
    with pytest.raises(UserError, match="the data ends after 350 sequences"):
        mixture.locate(350)


def test_a_later_phase_changes_nothing_before_it() -> None:
    plain, phased = plan([0.45, 0.45, 0.1]), plan([0.45, 0.45, 0.1], at_12345=[0.5, 0.1, 0.4])
    assert [plain.locate(index) for index in range(12_345)] == [phased.locate(index) for index in range(12_345)]
    counts = taken(phased, 12_345, 22_345)
    assert [counts[source] for source in range(3)] == [5000, 1000, 4000]


def test_fingerprint_of_what_was_seen_does_not_depend_on_what_comes_later() -> None:
    plain, phased = plan([0.45, 0.45, 0.1]), plan([0.45, 0.45, 0.1], at_500=[0.5, 0.1, 0.4])
    assert plain.fingerprint(500) == phased.fingerprint(500)
    assert plain.fingerprint(501) != phased.fingerprint(501)


@pytest.mark.parametrize(
    "other",
    [
        {"weights": [2, 1]},
        {"weights": [1, 2], "seed": 1},
        {"weights": [1, 2], "caps": [0.01, None]},
        {"weights": [1, 2], "at_5": [2, 1]},
    ],
)
def test_fingerprint_tells_plans_apart(other: dict[str, Any]) -> None:
    assert plan([1, 2]).fingerprint(10) == plan([2, 4]).fingerprint(10)
    assert plan([1, 2]).fingerprint(10) != plan(**other).fingerprint(10)


def test_fingerprint_tells_content_and_limits_apart() -> None:
    def fingerprint(content: str, identity: str) -> str:
        return Plan(
            [Ingredient({"a": 1.0}, Numbered(), content)], [Phase(0, {0: 1})], seed=0, identity=identity
        ).fingerprint()

    assert len({fingerprint(content, identity) for content in "ab" for identity in "cd"}) == 4


def test_small_weights_are_not_lost() -> None:
    assert taken(plan([1, 1e-9]), 0, 10_000) == {0: 9_999, 1: 1}


def test_no_source_settles_on_one_data_parallel_rank() -> None:
    mixture = plan([1, 1])
    even = Counter(mixture.locate(index)[0] for index in range(0, 4000, 2))
    assert even[0] == pytest.approx(1000, rel=0.1)


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1]])
def test_impossible_weights(weights: list[float]) -> None:
    with pytest.raises(UserError, match="weights"):
        plan(weights)
