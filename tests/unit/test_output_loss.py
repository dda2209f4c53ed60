"""The output's z-loss against plain torch on the whole vocabulary; on parts of it in tests/parallel/test_z_loss.py."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from megatron_mm1.model.output_loss import cross_entropy_with_z_loss

COEFFICIENT = 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_the_cross_entropy_and_gradient_has_the_z_loss(groups, dtype):
    generator = torch.Generator().manual_seed(0)
    given = (5 * torch.randn(6, 2, 16, generator=generator)).to(dtype)
    labels = torch.randint(16, (6, 2), generator=generator)
    weights = torch.rand(6, 2, generator=generator).round()  # trained or not

    logits = given.clone().requires_grad_()
    losses = cross_entropy_with_z_loss(1 * logits, labels, coefficient=COEFFICIENT, group=groups.tp)
    (losses * weights).sum().backward()

    expected = given.float().requires_grad_()
    plain = cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="none").view(6, 2)
    torch.testing.assert_close(losses.detach(), plain.detach())
    ((plain + COEFFICIENT * expected.logsumexp(-1).square()) * weights).sum().backward()
    torch.testing.assert_close(logits.grad, expected.grad.to(dtype))
    assert (logits.grad.flatten(0, 1)[weights.flatten() == 0] == 0).all() and (weights == 0).any()


def test_a_label_outside_of_the_vocabulary_does_not_disturb_others(groups):
    logits = torch.randn(3, 1, 8, requires_grad=True)
    labels = torch.tensor([[1], [-100], [7]])
    losses = cross_entropy_with_z_loss(1 * logits, labels, coefficient=COEFFICIENT, group=groups.tp)
    losses.masked_fill(labels < 0, 0.0).sum().backward()
    assert torch.isfinite(losses).all() and (logits.grad[1] == 0).all() and (logits.grad[0] != 0).any()
