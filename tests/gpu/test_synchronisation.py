"""Inside a training step the host runs ahead of the device: it waits where a step's figures are read, nowhere else."""

import dataclasses
from itertools import islice

import pytest
import torch

from megatron_mm1.config.schema import MoEConfig
from megatron_mm1.training.build import build_model, build_optimizer
from megatron_mm1.training.step import train_step
from tests.gpu.marks import BACKENDS, GPU
from tests.gpu.models import small_config
from tests.gpu.stream import stream
from tests.gpu.waits import counted_calls, recorded_waits

pytestmark = GPU

ONCE_A_STEP = ("step.py _global_statistics", "step.py update_weights")
"""Read the step's loss, after its last backward pass has been launched, and then the gradient norm."""
OF_EXPERTS = {
    "transformer_engine": ("token_dispatcher.py _maybe_dtoh_and_synchronize",),
    "local": ("token_dispatcher.py _maybe_dtoh_and_synchronize", "moe_utils.py permute", "experts.py forward"),
}
"""How many tokens each expert got: without a capacity, the sizes of the next products."""
MICROBATCHES = (2, 6)


def stepper(groups, *, backend: str, microbatches: int, moe: MoEConfig | None = None):
    """A training step of so many microbatches, warm."""
    config = small_config(moe=moe)
    rows = config.training.micro_batch_size
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, global_batch_size=rows * microbatches)
    )
    model = build_model(config, backend=backend, pg_collection=groups)
    optimizer, scheduler = build_optimizer(config, model, pg_collection=groups)
    batches = list(islice(stream(config), microbatches))

    def step() -> None:
        train_step(config, model, optimizer, scheduler, batches, pg_collection=groups)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    return step


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dense_step_waits_only_for_its_figures(groups, backend):
    step = stepper(groups, backend=backend, microbatches=MICROBATCHES[0])
    with recorded_waits() as waits:
        step()
    assert waits.stacks, "reading the loss must wait: are waits recorded at all?"
    assert not waits.elsewhere(ONCE_A_STEP)


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_wait_only_for_their_counts(groups, backend):
    moe = MoEConfig(num_moe_experts=4, moe_layer_freq=2)
    step = stepper(groups, backend=backend, microbatches=MICROBATCHES[0], moe=moe)
    with recorded_waits() as waits:
        step()
    assert not waits.elsewhere((*ONCE_A_STEP, *OF_EXPERTS[backend]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_waits_do_not_grow_with_the_microbatches(groups, backend):
    """As CUDA itself counts them, calls of libraries included."""
    few, many = (counted_calls(stepper(groups, backend=backend, microbatches=count)) for count in MICROBATCHES)
    assert few, "not one call recorded: does the profiler see CUDA?"
    assert many == few
