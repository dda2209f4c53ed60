"""A dense model upcycled and loaded into an expert-parallel layout."""

import pytest
import torch

from tests.upcycling import CASES, DENSE, dense_model, losses, losses_in_layout, upcycled, with_model


@pytest.mark.parametrize("case", ["every block", "halves"])
def test_the_first_loss_is_the_dense_models_with_the_experts_on_two_ranks(pool, groups, case):
    model, state = dense_model(DENSE, groups)
    config, tensors = upcycled(state, CASES[case])
    config = with_model(config.model, expert_model_parallel_size=2)
    for found in pool(2).run(losses_in_layout, config, tensors):
        torch.testing.assert_close(found, losses(model), atol=5e-6, rtol=0)
