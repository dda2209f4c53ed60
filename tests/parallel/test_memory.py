"""Planned parameters, gradients and optimizer state are those that ranks hold."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mm1.planning.memory import plan_memory
from megatron_mm1.planning.shards import rank_parameters
from tests.parallel import jobs, memory_jobs
from tests.parallel.test_layouts import config_of

TP_SP = dict(tensor_model_parallel_size=2, sequence_parallel=True)
LAYOUTS = {
    "TP2+SP": ("mm1-tiny", TP_SP),
    "TP2, images shared": ("mm1-tiny", dict(tensor_model_parallel_size=2, vision_parallel_mode="data")),
    "PP2": ("mm1-tiny", dict(pipeline_model_parallel_size=2)),
    "PP2, tied output": ("mm1-tiny-tied", dict(pipeline_model_parallel_size=2)),
    "PP2 VPP2, bf16": (
        "mm1-tiny-bf16",
        dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ),
    "CP2": ("mm1-tiny", dict(context_parallel_size=2)),
    "DP2, distributed optimizer": ("mm1-tiny", dict(use_distributed_optimizer=True)),
    "DP2, distributed optimizer, bf16": ("mm1-tiny-bf16", dict(use_distributed_optimizer=True)),
    "EP2, distributed optimizer": (
        "mm1-tiny-moe",
        dict(expert_model_parallel_size=2, use_distributed_optimizer=True),
    ),
    "TP2+SP ETP2": ("mm1-tiny-moe", dict(**TP_SP, expert_tensor_parallel_size=2)),
}
PADDING = 0.01
"""Of buffers, whose parameters begin at multiples of 64 elements, and which end at what their shares are equal in."""

pytestmark = pytest.mark.demo


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_hold_what_is_planned(layout: str, pool, demo_corpus: Path) -> None:
    name, sizes = LAYOUTS[layout]
    config = config_of(name, **sizes)
    plan = plan_memory(config, world_size=2)
    for held in pool(2).run(memory_jobs.held_by_rank, config):
        rank = held["pipeline_rank"]
        assert held["parameters"] == rank_parameters(config, rank).total
        assert held["gradients"] == pytest.approx(plan[rank].gradients, rel=PADDING)
        assert held["optimizer"] == pytest.approx(plan[rank].optimizer, rel=PADDING)


def test_a_run_says_what_is_planned_and_then_what_it_took(pool, demo_corpus: Path, tmp_path: Path) -> None:
    config = config_of("mm1-tiny", pipeline_model_parallel_size=2)
    training = replace(config.training, train_iters=11, eval_interval=0)
    config = replace(config, training=training, run_dir=str(tmp_path))
    pool(2).run(jobs.train_as_users_do, config)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (memory,) = [record for record in records if record["kind"] == "memory"]
    assert memory["iteration"] == 10
    planned = [rank.total / 2**30 for rank in plan_memory(config, world_size=2)]
    assert [memory["planned 0"], memory["planned 1"]] == pytest.approx(planned)
    assert 0.1 < memory["measured 0"] < 16
    assert 0.1 < memory["measured 1"] < 16
