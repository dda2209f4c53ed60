"""Orders chosen by a key."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mm1.data.order import KeyedPermutation, hash_numbers, permutation


def test_hash_is_splitmix64() -> None:
    """First outputs of SplitMix64 seeded with the key's first eight bytes of SHA-256, by plain integer arithmetic."""
    state, expected = int.from_bytes(hashlib.sha256(b"key").digest()[:8], "little"), []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        expected.append(z ^ (z >> 31))
    assert hash_numbers("key", 3).tolist() == expected


def test_permutation_is_one_and_depends_on_its_key() -> None:
    assert sorted(permutation("a", 1000)) == list(range(1000))
    assert (permutation("a", 1000) != permutation("b", 1000)).mean() > 0.9


@given(st.integers(1, 3000), st.text(max_size=5))
def test_keyed_permutation_is_a_permutation(size: int, key: str) -> None:
    assert sorted(KeyedPermutation(key, size)(np.arange(size))) == list(range(size))


def test_keyed_permutation_asked_piece_by_piece_is_the_same() -> None:
    order = KeyedPermutation("a", 1000)
    assert [int(order(np.array([place]))[0]) for place in range(1000)] == order(np.arange(1000)).tolist()


@pytest.mark.parametrize("size", [1000, 4096, 5000])
def test_keyed_permutation_leaves_no_trace_of_the_old_order(size: int) -> None:
    """Rank correlation and the share of neighbours that stay neighbours, against those of a random order."""
    order = KeyedPermutation("a", size)(np.arange(size))
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.1
    assert (np.abs(np.diff(order)) == 1).sum() < 10
    assert (order != KeyedPermutation("b", size)(np.arange(size))).mean() > 0.98


def test_keyed_permutation_of_a_huge_range_costs_nothing() -> None:
    order = KeyedPermutation("a", 10**12)
    places = order(np.arange(100_000) * 9_999_999)
    assert len(set(places.tolist())) == 100_000
    assert 0 <= places.min() < 10**9
    assert 10**12 > places.max() > 10**12 - 10**9
