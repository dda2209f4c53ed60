"""The pipeline split against an exhaustive search."""

import random
from collections.abc import Iterator
from itertools import combinations, pairwise

import pytest

from megatron_mm1.config.presets import preset
from megatron_mm1.errors import ConfigError
from megatron_mm1.planning.pipeline import balanced_split, balanced_stage_blocks


def stage_costs(costs: list[float], counts: list[int], first: float, last: float) -> list[float]:
    ends = [sum(counts[:stage]) for stage in range(len(counts) + 1)]
    stages = [sum(costs[start:end]) for start, end in pairwise(ends)]
    stages[0] += first
    stages[-1] += last
    return stages


def every_split(blocks: int, stages: int) -> Iterator[list[int]]:
    for cuts in combinations(range(1, blocks), stages - 1):
        yield [end - start for start, end in pairwise([0, *cuts, blocks])]


@pytest.mark.parametrize("seed", range(40))
def test_split_has_the_least_maximum_and_then_the_least_sum_of_squares(seed: int) -> None:
    draw = random.Random(seed)
    costs = [float(draw.randint(1, 9)) for _ in range(draw.randint(1, 9))]
    stages = draw.randint(1, len(costs))
    first, last = float(draw.randint(0, 30)), float(draw.randint(0, 10))

    def badness(counts: list[int]) -> tuple[float, float]:
        stage = stage_costs(costs, counts, first, last)
        return max(stage), sum(cost**2 for cost in stage)

    counts = balanced_split(costs, pipeline_size=stages, first_extra=first, last_extra=last)
    assert len(counts) == stages and sum(counts) == len(costs) and min(counts) >= 1
    assert badness(counts) == min(badness(other) for other in every_split(len(costs), stages))


def test_equal_blocks_are_spread_evenly() -> None:
    assert balanced_split([1.0] * 8, pipeline_size=4) == [2, 2, 2, 2]


def test_the_stage_with_the_tower_gets_fewer_blocks() -> None:
    model = preset("mm1-30b").model
    blind = balanced_stage_blocks(model, pipeline_size=8, seq_length=4096, images_per_sequence=0)
    seeing = balanced_stage_blocks(model, pipeline_size=8, seq_length=4096, images_per_sequence=14.2)
    assert blind[0] == 6 and seeing[0] < 6
    assert sum(seeing) == sum(blind) == 48


def test_more_stages_than_blocks_is_an_error() -> None:
    with pytest.raises(ConfigError, match="pipeline_model_parallel_size 5 does not split 4 blocks: use 1 to 4"):
        balanced_split([1.0] * 4, pipeline_size=5)
