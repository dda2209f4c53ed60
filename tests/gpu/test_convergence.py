"""200 steps of small models, dense and with experts, in each FP8 recipe, everything in FP8 that can be, beside bf16."""

import functools
import statistics
from collections.abc import Callable, Sequence

import pytest
import torch

from megatron_mm1.config.schema import MoEConfig
from megatron_mm1.training.build import build_model, build_optimizer
from megatron_mm1.training.step import train_step
from tests.gpu.marks import TRANSFORMER_ENGINE
from tests.gpu.models import FP8_RECIPES, all_fp8, small_config
from tests.gpu.stream import least_loss, stream

pytestmark = TRANSFORMER_ENGINE

STEPS = 200
DECODERS = {"dense": None, "experts": MoEConfig(num_moe_experts=4, moe_layer_freq=2, moe_ffn_hidden_size=256)}
WITHIN = 0.03
"""Share of bf16's loss that FP8's may be off: rounding makes single steps differ by more, not 20 of them."""


def mean_of_last(losses: Sequence[float]) -> float:
    return statistics.mean(losses[-20:])


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
def bf16_loss(groups) -> Callable[[str], float]:
    """The mean loss of the last steps in bf16, by the decoder's kind."""

    @functools.cache
    def final(decoder: str) -> float:
        got = losses(small_config(moe=DECODERS[decoder]), groups, backend="transformer_engine", steps=STEPS)
        # Half of what there is to learn, at least.
        assert mean_of_last(got) < (got[0] + least_loss()) / 2, f"bf16 does not learn: {got[0]:.3f} to {got[-1]:.3f}"
        return mean_of_last(got)

    return final


@pytest.mark.parametrize("recipe", FP8_RECIPES)
@pytest.mark.parametrize("decoder", DECODERS)
def test_fp8_learns_as_bf16_does(groups, bf16_loss, decoder, recipe):
    config = all_fp8(recipe, small_config(moe=DECODERS[decoder]))
    got = losses(config, groups, backend="transformer_engine", steps=STEPS)
    assert mean_of_last(got) == pytest.approx(bf16_loss(decoder), rel=WITHIN)
