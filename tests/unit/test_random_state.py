"""Random number generators that go on where a run stopped."""

import torch
from megatron.core import tensor_parallel

from megatron_mm1.training.random_state import random_state, restore_random_state


def draw() -> list[float]:
    with tensor_parallel.get_cuda_rng_tracker().fork():
        tracked = float(torch.rand(()))
    return [float(torch.rand(())), tracked]


def test_numbers_go_on() -> None:
    tensor_parallel.model_parallel_cuda_manual_seed(5, tp_rank=0, ep_rank=0, etp_rank=0)
    state = random_state()
    expected = draw()
    assert draw() != expected
    restore_random_state(state)
    assert draw() == expected


def test_a_state_of_the_other_kind_of_device_leaves_the_generators_of_the_device_alone() -> None:
    tensor_parallel.model_parallel_cuda_manual_seed(5, tp_rank=0, ep_rank=0, etp_rank=0)
    of_this_device = random_state()
    _, tracked = draw()
    no_state = torch.zeros(16, dtype=torch.uint8)  # as long as a GPU's; a CPU's has 5056 bytes
    other = None if torch.cuda.is_available() else no_state
    restore_random_state(of_this_device)
    restore_random_state({**of_this_device, "cuda": other, "tracker": {"model-parallel-rng": no_state}})
    assert draw() == [draw_again(of_this_device), tracked]


def draw_again(state: dict) -> float:
    """The first number of the plain generator in this state."""
    generator = torch.Generator()
    generator.set_state(state["torch"])
    return float(torch.rand((), generator=generator))
