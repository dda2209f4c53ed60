"""Models trained by a ramp of batch sizes, with parts frozen at first and by AdaFactor, in inference and in the
comparison of layouts: neither has a schedule, so layouts that the schedule would forbid are theirs.
"""

from dataclasses import replace

import pytest
import torch

from megatron_mm1.config import MM1Config
from megatron_mm1.config.presets import preset
from megatron_mm1.config.schema import BatchSizeStage
from megatron_mm1.config.validation import validate
from megatron_mm1.errors import ConfigError
from megatron_mm1.inference.loading import AS_TRAINED, inference_config
from megatron_mm1.parity.jobs import LEARNING_RATE, Trial, synthetic_share
from megatron_mm1.parity.layouts import choose_layouts
from tests.parallel.jobs import with_parallel


@pytest.fixture
def trained() -> MM1Config:
    """Eight processes cannot share a batch of four sequences."""
    config = with_parallel(preset("mm1-tiny"))
    return replace(
        config,
        training=replace(
            config.training,
            global_batch_size=16,
            micro_batch_size=2,
            batch_size_ramp=(BatchSizeStage(until=2, global_batch_size=4),),
            frozen_steps={"tower": 5, "connector": 9},
        ),
        optimizer=replace(config.optimizer, optimizer="adafactor"),
        data=replace(config.data, sources=(), validation=()),
    )


def test_the_schedule_would_forbid_eight_processes(trained: MM1Config) -> None:
    with pytest.raises(ConfigError, match="batch_size_ramp"):
        validate(trained, world_size=8)


def test_inference_has_no_schedule(trained: MM1Config) -> None:
    config = inference_config(trained, sizes=AS_TRAINED, world_size=8)
    assert (config.training.batch_size_ramp, config.training.frozen_steps) == ((), {})
    validate(config, world_size=8)
    assert config.model == trained.model


def test_layouts_are_compared_without_a_schedule(trained: MM1Config) -> None:
    [layout] = choose_layouts(trained, "PP2 DP4", max_world_size=8)
    for config in (layout.configure(trained), layout.reference(trained)):
        assert (config.training.batch_size_ramp, config.training.frozen_steps) == ((), {})
    validate(layout.configure(trained), world_size=8)


def error_of_a_step(config: MM1Config) -> float:
    """How far a step of the comparison is from ten times the clipped gradient, relative to that, in one process."""
    trial = Trial(config, backend="local")
    trial.keep_initial()
    trial.backward(synthetic_share(trial.config, "mixed", trial.groups))
    gradients = [parameter.main_grad.flatten().clone() for chunk in trial.model for parameter in chunk.parameters()]
    norm = trial.update()
    steps = [
        (before - after).flatten().detach()
        for chunk, weights in zip(trial.model, trial.initial, strict=True)
        for before, after in zip(weights, chunk.parameters(), strict=True)
    ]
    trial.close()
    expected = LEARNING_RATE * torch.cat(gradients) * min(1.0, config.optimizer.clip_grad / norm)
    return float((torch.cat(steps) - expected).norm() / expected.norm())


def test_the_comparison_descends_by_the_gradient_whatever_the_model_was_trained_with(pool, trained: MM1Config) -> None:
    """AdaFactor's step, and Adam's, would be of one size in every element."""
    [layout] = choose_layouts(trained, "DP2", max_world_size=2)
    assert pool(1).run(error_of_a_step, layout.reference(trained)) == [pytest.approx(0.0, abs=1e-4)]
