"""Dealing a global batch out to data-parallel ranks: every microbatch once, equally many each, images evened out."""

from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_mm1.config import TrainingConfig
from megatron_mm1.config.batch_sizes import BatchSizes
from megatron_mm1.data.balance import Dealer, deal, imbalance


@st.composite
def global_batches(draw: st.DrawFn, *, most_ranks: int = 8, most_each: int = 8) -> tuple[np.ndarray, int]:
    """Images of each microbatch, and a number of ranks that divides them."""
    num_ranks = draw(st.integers(1, most_ranks))
    size = num_ranks * draw(st.integers(1, most_each))
    return np.array(draw(st.lists(st.integers(0, 20), min_size=size, max_size=size))), num_ranks


def per_rank(images: np.ndarray, num_ranks: int) -> np.ndarray:
    return images[deal(images, num_ranks=num_ranks)].sum(axis=1)


def in_turn(images: np.ndarray, num_ranks: int) -> np.ndarray:
    return images.reshape(-1, num_ranks).sum(axis=0)


def fewest_possible(images: list[int], each: int) -> int:
    """The images of the fullest rank in the best deal there is, by trying all of them."""
    if not images:
        return 0
    best = sum(images)
    for others in combinations(range(1, len(images)), each - 1):
        mine = {0, *others}
        rest = [count for number, count in enumerate(images) if number not in mine]
        best = min(best, max(sum(images[number] for number in mine), fewest_possible(rest, each)))
    return best


@given(global_batches())
def test_every_microbatch_goes_to_one_rank_and_every_rank_gets_as_many(case: tuple[np.ndarray, int]) -> None:
    images, num_ranks = case
    dealt = deal(images, num_ranks=num_ranks)
    assert dealt.shape == (num_ranks, len(images) // num_ranks)
    assert sorted(dealt.ravel()) == list(range(len(images)))


@given(global_batches())
@example((np.array([5, 8, 2, 0, 2, 6, 5, 0]), 2))  # in turn: as even as can be
def test_fullest_rank_is_never_fuller_than_if_dealt_in_turn(case: tuple[np.ndarray, int]) -> None:
    assert per_rank(*case).max() <= in_turn(*case).max()


@given(global_batches(most_ranks=4, most_each=4))
def test_no_exchange_of_two_microbatches_would_help(case: tuple[np.ndarray, int]) -> None:
    images, num_ranks = case
    dealt = deal(images, num_ranks=num_ranks)
    most = images[dealt].sum(axis=1).max()
    for one, other in combinations(range(len(images)), 2):
        exchanged = np.where(dealt == one, other, np.where(dealt == other, one, dealt))
        assert images[exchanged].sum(axis=1).max() >= most


@pytest.mark.parametrize(("num_ranks", "each"), [(2, 2), (2, 4), (2, 5), (3, 2), (3, 3), (4, 2)])
def test_deal_is_close_to_the_best_there_is(num_ranks: int, each: int) -> None:
    rng = np.random.default_rng(0)
    excess = []
    for _ in range(60):
        images = rng.integers(0, rng.integers(2, 33), num_ranks * each)
        best = fewest_possible(images.tolist(), each)
        excess.append(per_rank(images, num_ranks).max() / max(best, 1) - 1)
    assert np.mean(np.array(excess) == 0) >= 0.95
    assert max(excess) <= 0.05


@given(global_batches())
def test_ranks_run_microbatches_of_similar_size_at_the_same_time(case: tuple[np.ndarray, int]) -> None:
    """Each rank starts with its largest, as long as there are two ranks to keep in step."""
    images, num_ranks = case
    dealt = deal(images, num_ranks=num_ranks)
    if num_ranks == 1:
        assert dealt.tolist() == [list(range(len(images)))]
    else:
        assert (np.diff(images[dealt], axis=1) <= 0).all()


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 3))
def test_equal_microbatches_are_dealt_in_turn(num_ranks: int, each: int, images: int) -> None:
    dealt = deal(np.full(num_ranks * each, images), num_ranks=num_ranks)
    assert dealt.tolist() == np.arange(num_ranks * each).reshape(each, num_ranks).T.tolist()


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([8, 0, 8, 0], [[0, 1], [2, 3]]),  # in turn: 16 and 0
        ([9, 6, 5, 5, 3, 3], [[0, 4, 5], [1, 2, 3]]),  # rounds of neighbours alone: 17 and 14
        ([4, 1, 1, 0], [[0, 3], [1, 2]]),  # one is too large to even out
    ],
)
def test_deals(images: list[int], expected: list[list[int]]) -> None:
    dealt = deal(np.array(images), num_ranks=2)
    assert sorted(dealt.tolist()) == expected


def test_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="6 microbatches cannot be dealt evenly to 4 ranks"):
        deal(np.zeros(6, np.int64), num_ranks=4)


@pytest.mark.parametrize(
    ("images", "expected"), [([3, 1], 1.5), ([2, 2], 1.0), ([0, 0], 1.0), ([4, 0, 0, 0], 4.0), ([7], 1.0)]
)
def test_imbalance_is_the_most_over_the_mean(images: list[int], expected: float) -> None:
    assert imbalance(np.array(images)) == expected


class CountedPlan:
    """Stands for a plan of which only the images of each sequence matter: its index modulo 5."""

    def num_images(self, index: int) -> int:
        return index % 5


def dealer(dp_size: int, **settings: bool) -> Dealer:
    batch_sizes = BatchSizes.of(TrainingConfig(global_batch_size=16))
    return Dealer(CountedPlan(), micro_batch_size=2, batch_sizes=batch_sizes, dp_size=dp_size, **settings)  # type: ignore[arg-type]


def test_images_of_a_microbatch_are_those_of_its_sequences() -> None:
    assert dealer(1).num_images(1).tolist() == [1 + 2, 3 + 4, 0 + 1, 2 + 3, 4 + 0, 1 + 2, 3 + 4, 0 + 1]  # from 16 on
    assert dealer(2, text_only=True).num_images(1).tolist() == [0] * 8


@pytest.mark.parametrize("dp_size", [1, 2, 4, 8])
def test_every_size_deals_out_the_same_global_batch(dp_size: int) -> None:
    shares = [dealer(dp_size).microbatches(3, dp_rank=rank) for rank in range(dp_size)]
    assert {len(share) for share in shares} == {8 // dp_size}
    assert sorted(chain(*shares)) == list(range(24, 32))
    images = dealer(dp_size).num_images(3)
    assert dealer(dp_size).images_per_rank(3).tolist() == [sum(images[n - 24] for n in share) for share in shares]
