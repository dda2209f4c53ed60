"""`mm1 bench step` on two processes: where ranks wait for each other, and that looking changes nothing."""

from dataclasses import replace

import pytest

from megatron_mm1.bench.clock import BUBBLE, COLLECTIVES, DATA, DECODER, OPTIMIZER, PARTS, TOWER
from megatron_mm1.config import ParallelConfig
from megatron_mm1.config.loading import load_config
from tests.parallel.slowed import (
    SMALL,
    measure,
    step_with_and_without_instruments,
    take_apart_with_a_slow_rank,
)

DELAY = 0.7
"""Seconds: several times what a step of this model takes on a busy machine."""
LAYOUTS = {
    "PP2": dict(pipeline_model_parallel_size=2),
    "PP2 VPP2": dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "TP2": dict(tensor_model_parallel_size=2),
    "TP2+SP": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "TP2 images shared": dict(tensor_model_parallel_size=2, vision_parallel_mode="data"),
    "CP2 images shared": dict(context_parallel_size=2, vision_parallel_mode="data"),
    "DP2": dict(),
    "DP2 overlapped": dict(use_distributed_optimizer=True, overlap_grad_reduce=True),
    "EP2": dict(expert_model_parallel_size=2),
}
MORE_MICROBATCHES = {"PP2 VPP2": ["--global_batch_size", "4"]}  # so that forward and backward messages cross


def config_of(layout):
    preset = "mm1-tiny-moe" if layout.startswith("EP") else "mm1-tiny"
    config = load_config(["--preset", preset, *SMALL, *MORE_MICROBATCHES.get(layout, [])])
    return replace(config, parallel=ParallelConfig(**LAYOUTS[layout]))


@pytest.mark.parametrize(
    ("layout", "slow_rank", "own", "others"),
    [
        # Forward the second stage waits for the first, and at the end, when it has nothing left to do.
        ("PP2", 0, TOWER, BUBBLE),
        ("PP2", 1, DECODER, BUBBLE),
        ("PP2 VPP2", 0, TOWER, BUBBLE),
        ("PP2 VPP2", 1, DECODER, BUBBLE),
        ("TP2", 1, TOWER, COLLECTIVES),
        ("DP2", 0, TOWER, COLLECTIVES),
        ("DP2 overlapped", 0, TOWER, COLLECTIVES),
    ],
)
def test_a_slow_rank_costs_the_other_time_in_the_part_where_it_waits(pool, layout, slow_rank, own, others):
    results = pool(2).run(take_apart_with_a_slow_rank, config_of(layout), slow_rank=slow_rank, seconds=DELAY)
    (slow, delay), (waiting, _) = results[slow_rank], results[1 - slow_rank]
    assert delay >= 2 * DELAY
    assert slow[own] > 0.95 * delay
    assert max(slow[part] for part in PARTS if part != own) < DELAY
    assert waiting[others] > delay - DELAY  # what it computes meanwhile is no waiting
    assert max(waiting[part] for part in PARTS if part != others) < DELAY


@pytest.mark.parametrize("layout", LAYOUTS)
def test_instruments_change_no_result(pool, layout):
    for expected, apart in pool(2).run(step_with_and_without_instruments, config_of(layout)):
        assert apart == expected


def test_pipeline_record(pool):
    first, second = pool(2).run(measure, config_of("PP2"))
    assert first == second
    assert first["settings"]["layout"] == "2 processes: pipeline 2"
    assert first["step"]["images"] > 0
    parts, seconds = first["instrumented"]["parts"], first["instrumented"]["seconds"]
    assert list(parts) == list(PARTS)
    assert parts[TOWER]["by_rank"][0] > 0 == parts[TOWER]["by_rank"][1]
    for part in (DATA, DECODER, BUBBLE, OPTIMIZER, COLLECTIVES):
        assert min(parts[part]["by_rank"]) > 0
    assert sum(times["mean"] for times in parts.values()) == pytest.approx(seconds["mean"], rel=0.02, abs=0.02)
