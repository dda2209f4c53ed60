"""The output's z-loss where tensor-parallel ranks share the vocabulary; in whole models: test_parity.py's experts."""

import torch
from torch.nn.functional import cross_entropy

from megatron_mm1.config import ParallelConfig
from megatron_mm1.model.output_loss import cross_entropy_with_z_loss
from megatron_mm1.parallel.groups import build_process_groups, destroy_process_groups

COEFFICIENT = 0.3


def whole_logits():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(10, 1, 12, generator=generator)
    logits[::2, :, 6:] -= 20  # all of the sum in one rank's part, or in the other's
    logits[1::2, :, :6] -= 20
    return logits, torch.randint(12, (10, 1), generator=generator)


def loss_of_a_part():
    groups = build_process_groups(ParallelConfig(tensor_model_parallel_size=2), seed=1)
    logits, labels = whole_logits()
    part = logits.chunk(2, dim=-1)[groups.tp.rank()].clone().requires_grad_()
    losses = cross_entropy_with_z_loss(1 * part, labels, coefficient=COEFFICIENT, group=groups.tp)
    losses.sum().backward()
    destroy_process_groups()
    return losses.detach(), part.grad


def test_parts_of_a_vocabulary_have_the_loss_and_gradient_of_the_whole(pool):
    logits, labels = whole_logits()
    logits.requires_grad_()
    plain = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    (plain + COEFFICIENT * logits.logsumexp(-1).square().flatten()).sum().backward()
    ranks = pool(2).run(loss_of_a_part)
    for losses, _ in ranks:
        torch.testing.assert_close(losses.flatten(), plain.detach())
    torch.testing.assert_close(torch.cat([gradient for _, gradient in ranks], dim=-1), logits.grad)
