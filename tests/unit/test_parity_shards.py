"""Shards against a whole reference: copies, gaps, strangers and NaN."""

import math

import pytest
import torch

from megatron_mm1.parity.shards import Shard, relative_errors, squared_errors, whole_tensors

WHOLE = {"a": torch.arange(12.0).view(4, 3), "b": torch.ones(5)}
SCALES = {name: float(tensor.norm()) for name, tensor in WHOLE.items()}


def rows(name: str, start: int, stop: int, *, add: float = 0.0) -> Shard:
    data = WHOLE[name][start:stop] + add
    return Shard(name, (start, *(0 for _ in data.shape[1:])), tuple(WHOLE[name].shape), data)


RIGHT = [[rows("a", 0, 2), rows("b", 0, 5)], [rows("a", 2, 4), rows("b", 0, 5)]]


def errors(ranks: list[list[Shard]]) -> dict[str, float]:
    return relative_errors([squared_errors(iter(parts), WHOLE) for parts in ranks], WHOLE, scales=SCALES)


def test_shards_of_the_reference_have_no_error():
    assert errors(RIGHT) == {"a": 0.0, "b": 0.0}


def test_the_error_is_the_norm_of_the_difference_over_the_scale():
    ranks = [[rows("a", 0, 2, add=0.5), rows("b", 0, 5)], [rows("a", 2, 4, add=0.25), rows("b", 0, 5)]]
    assert errors(ranks)["a"] == pytest.approx(math.sqrt(6 * 0.25 + 6 * 0.0625) / SCALES["a"])


def test_of_copies_the_worst_counts():
    ranks = [RIGHT[0], [rows("a", 2, 4), rows("b", 0, 5, add=1.0)]]
    assert errors(ranks)["b"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        ([RIGHT[0], [rows("b", 0, 5)]], "a"),  # rows 2 and 3 are nowhere
        ([RIGHT[0], [*RIGHT[1], Shard("c", (0,), (1,), torch.zeros(1))]], "c"),  # not in the reference
        ([RIGHT[0], [rows("a", 2, 4), Shard("b", (0,), (6,), torch.ones(6))]], "b"),  # another shape
        ([RIGHT[0], [rows("a", 2, 4), rows("b", 0, 5, add=math.nan)]], "b"),
    ],
    ids=["a gap", "a stranger", "another shape", "NaN"],
)
def test_what_cannot_be_compared_is_infinitely_far(ranks, name):
    assert errors(ranks)[name] == math.inf


def test_the_whole_is_put_together_from_shards():
    whole = whole_tensors(iter([*RIGHT[0], *RIGHT[1]]))
    assert all(torch.equal(whole[name], WHOLE[name]) for name in WHOLE)
