"""Splitting, packing and the order of the mixture."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mm1.data.mixture import Plan, hash_numbers, permutation
from megatron_mm1.data.packing import pack_best_fit, split_document
from megatron_mm1.errors import UserError


@st.composite
def marked_documents(draw: st.DrawFn) -> tuple[int, list[int]]:
    kinds = draw(st.lists(st.booleans(), min_size=1, max_size=80))
    return len(kinds), [place for place, is_image in enumerate(kinds) if is_image]


limits = st.fixed_dictionaries(
    {"tokens_per_image": st.integers(1, 9), "seq_length": st.integers(9, 30), "max_images": st.integers(1, 4)}
)


@given(marked_documents(), limits)
def test_stretches_cover_the_document_and_fit(document: tuple[int, list[int]], limits: dict[str, int]) -> None:
    num_tokens, images = document
    stretches = split_document(num_tokens, images, **limits)
    assert [start for start, _ in stretches] == [0, *(stop for _, stop in stretches[:-1])]
    assert stretches[-1][1] == num_tokens
    for start, stop in stretches:
        inside = sum(start <= place < stop for place in images)
        assert start < stop
        assert inside <= limits["max_images"]
        assert stop - start + inside * (limits["tokens_per_image"] - 1) <= limits["seq_length"]


@given(marked_documents(), limits)
def test_no_image_is_parted_from_its_text(document: tuple[int, list[int]], limits: dict[str, int]) -> None:
    num_tokens, images = document
    for start, stop in split_document(num_tokens, images, **limits)[:-1]:
        all_images = set(range(start, stop)) <= set(images)
        assert all_images or stop - 1 not in images


@pytest.mark.parametrize(
    ("num_tokens", "images", "expected"),
    [
        (10, [], [(0, 10)]),
        (11, [], [(0, 10), (10, 11)]),
        (8, [0], [(0, 7), (7, 8)]),  # 4 + 6 positions, then 1
        (6, [5], [(0, 6)]),  # 5 + 4 positions
        (12, [6], [(0, 6), (6, 12)]),  # the image would just fit, but its text would not
        (4, [0, 1, 2], [(0, 2), (2, 4)]),  # two images at most
    ],
)
def test_split_examples(num_tokens: int, images: list[int], expected: list[tuple[int, int]]) -> None:
    assert split_document(num_tokens, images, tokens_per_image=4, seq_length=10, max_images=2) == expected


def test_image_longer_than_a_sequence_is_an_error() -> None:
    with pytest.raises(UserError, match="an image takes 144 tokens, a sequence holds 128"):
        split_document(3, [1], tokens_per_image=144, seq_length=128, max_images=16)


items = st.lists(st.tuples(st.integers(1, 32), st.integers(0, 3)), max_size=200)


@given(items, st.integers(1, 10))
def test_packing_keeps_every_item_once_in_order_within_limits(items: list[tuple[int, int]], lookahead: int) -> None:
    lengths, images = np.array(items, np.int64).reshape(-1, 2).T
    packed = pack_best_fit(lengths, images, seq_length=32, max_images=4, lookahead=lookahead)
    assert sorted(item for sequence in packed for item in sequence) == list(range(len(items)))
    for sequence in packed:
        assert sequence == sorted(sequence)
        assert lengths[sequence].sum() <= 32
        assert images[sequence].sum() <= 4


def test_lookahead_fills_sequences_as_measured() -> None:
    """Web-like lengths: packing in order leaves a quarter of the positions empty, 64 open sequences about 2 %."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(6.8, 1.0, 4000).astype(np.int64) + 8, 4096)
    none = np.zeros_like(lengths)

    def fill(lookahead: int) -> float:
        packed = pack_best_fit(lengths, none, seq_length=4096, max_images=16, lookahead=lookahead)
        return lengths.sum() / (len(packed) * 4096)

    assert fill(1) < 0.85 < 0.97 < fill(64)


@pytest.mark.parametrize(("length", "images"), [(33, 0), (0, 0), (1, 5)])
def test_item_that_fits_no_sequence_is_refused(length: int, images: int) -> None:
    with pytest.raises(ValueError, match="fit a sequence"):
        pack_best_fit(np.array([length]), np.array([images]), seq_length=32, max_images=4, lookahead=1)


class FixedSource:
    """Stands for a packed source of which only name and content matter here."""

    def __init__(self, name: str) -> None:
        self.name, self.source = name, self
        self.fingerprint = name


def plan(weights: list[float], seed: int = 0) -> Plan:
    from megatron_mm1.data.mixture import PackingLimits

    limits = PackingLimits(seq_length=8, max_images=1, tokens_per_image=1, lookahead=1)
    sources = [FixedSource(str(number)) for number in range(len(weights))]
    return Plan(sources, weights=weights, limits=limits, seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", [[0.45, 0.45, 0.1], [1.0], [3, 1], [0.5, 0.10, 0.40], [1, 0, 1]])
@pytest.mark.parametrize("first", [0, 10_000, 123_456])
def test_weights_are_shares_of_sequences(weights: list[float], first: int) -> None:
    mixture = plan(weights)
    taken = Counter(mixture.locate(index)[0] for index in range(first, first + 1000))
    for source, weight in enumerate(weights):
        assert taken[source] == pytest.approx(1000 * weight / sum(weights), abs=5)


def test_each_source_is_used_in_its_own_order_without_gaps() -> None:
    mixture = plan([0.7, 0.3])
    for source in (0, 1):
        own = [place for number, place in map(mixture.locate, range(25_000)) if number == source]
        assert own == list(range(len(own)))


def test_small_weights_are_not_lost() -> None:
    mixture = plan([1, 1e-9])
    assert Counter(mixture.locate(index)[0] for index in range(10_000)) == {0: 9_999, 1: 1}


def test_no_source_settles_on_one_data_parallel_rank() -> None:
    mixture = plan([1, 1])
    even = Counter(mixture.locate(index)[0] for index in range(0, 4000, 2))
    assert even[0] == pytest.approx(1000, rel=0.1)


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1]])
def test_impossible_weights(weights: list[float]) -> None:
    with pytest.raises(UserError, match="weights"):
        plan(weights)


def test_fingerprint_tells_mixtures_apart() -> None:
    assert plan([1, 2]).fingerprint == plan([2, 4]).fingerprint
    assert len({plan(weights, seed).fingerprint for weights in ([1, 2], [2, 1]) for seed in (0, 1)}) == 4


def test_hash_is_splitmix64() -> None:
    """First outputs of SplitMix64 seeded with the key's first eight bytes of SHA-256, by plain integer arithmetic."""
    import hashlib

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
