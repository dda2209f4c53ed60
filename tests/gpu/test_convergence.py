"""200 steps of a small model in each FP8 recipe, everything in FP8 that can be, beside bf16."""

import statistics

import pytest
import torch

from megatron_mm1.training.build import build_model, build_optimizer
from megatron_mm1.training.step import train_step
from tests.gpu.marks import TRANSFORMER_ENGINE
from tests.gpu.models import FP8_RECIPES, all_fp8, small_config
from tests.gpu.stream import least_loss, stream

pytestmark = TRANSFORMER_ENGINE

STEPS = 200
WITHIN = 0.03
"""Share of bf16's loss that FP8's may be off: rounding makes single steps differ by more, not 20 of them."""


def losses(config, groups, *, backend: str, steps: int) -> list[float]:
    """Losses of the steps of a run that starts from seed 0, on the stream of seed 0."""
    torch.manual_seed(0)
    model = build_model(config, backend=backend, pg_collection=groups)
    optimizer, scheduler = build_optimizer(config, model, pg_collection=groups)
    batches = stream(config)
    return [
        train_step(config, model, optimizer, scheduler, [next(batches)], pg_collection=groups).losses.loss
        for _ in range(steps)
    ]


@pytest.fixture(scope="module")
def bf16_loss(groups) -> float:
    got = losses(small_config(), groups, backend="transformer_engine", steps=STEPS)
    final = statistics.mean(got[-20:])
    # Half of what there is to learn, at least.
    assert final < (got[0] + least_loss()) / 2, f"bf16 itself does not learn: {got[0]:.3f} to {final:.3f}"
    return final


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_fp8_learns_as_bf16_does(groups, bf16_loss, recipe):
    got = losses(all_fp8(recipe, small_config()), groups, backend="transformer_engine", steps=STEPS)
    assert statistics.mean(got[-20:]) == pytest.approx(bf16_loss, rel=WITHIN)
