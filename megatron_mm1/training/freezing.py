"""Components that are not trained in the first steps of a run (`training.frozen_steps`)."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from megatron.core.optimizer import MegatronOptimizer

from megatron_mm1.config.batch_sizes import BatchSizes
from megatron_mm1.config.schema import TrainingConfig
from megatron_mm1.training.build import Model, component_of, named_parameters


def frozen_components(training: TrainingConfig, *, consumed_sequences: int) -> frozenset[str]:
    """Components that do not train yet in the step that begins after so many sequences of the run."""
    before = BatchSizes.of(training).sequences_before
    return frozenset(name for name, steps in training.frozen_steps.items() if consumed_sequences < before(steps))


@contextmanager
def without_gradients(model: Model, components: Collection[str]) -> Iterator[None]:
    """Backward passes in this context stop at `components`: their gradients stay zero, and cost nothing."""
    parameters = [
        parameter
        for name, parameter in named_parameters(model)
        if parameter.requires_grad and component_of(name) in components
    ]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def hold_weights(optimizer: MegatronOptimizer, components: Collection[str]) -> None:
    """Keep weight decay off `components` for the coming update, which their zero gradients do not move; the scheduler's
    next step sets their learning rates again. Adam's step count goes on, so it corrects no bias when they begin.
    """
    for group in optimizer.param_groups:
        if group.get("component") in components:
            group["lr"] = 0.0
