"""The loss of the output layer: cross entropy over a vocabulary that tensor-parallel ranks share, with a z-loss."""

from typing import Any

import torch
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from torch import Tensor
from torch.distributed import ProcessGroup


def cross_entropy_with_z_loss(logits: Tensor, labels: Tensor, *, coefficient: float, group: ProcessGroup) -> Tensor:
    """The cross entropy, whose gradient is that of cross entropy + coefficient x (log of the sum of exp(logits))^2.

    So losses can be compared between models with and without the z-loss. What the caller does with a position's loss
    (mask it, weigh it) it does with its z-loss.

    Args:
        logits: [.., vocabulary / group size], this rank's part of the vocabulary; float32 ones are overwritten.
        labels: [..] int64; one outside of the vocabulary has a meaningless loss.
        group: the ranks that share the vocabulary, in the order of its parts.

    Returns:
        [..] float32.
    """
    losses, log_sums = _CrossEntropyAndLogSum.apply(logits, labels, group)
    z_losses = coefficient * log_sums.square()
    with_gradient: Tensor = losses + (z_losses - z_losses.detach())
    return with_gradient


class _CrossEntropyAndLogSum(torch.autograd.Function):
    """(cross entropy, log-sum-exp) of each position. The softmax that megatron-core's cross entropy keeps for its
    backward pass is all that the gradient of both needs.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
        parts = VocabParallelCrossEntropy
        logits, largest = parts.calculate_logits_max(logits)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
        first = group.rank() * logits.shape[-1]
        elsewhere, places, predicted, sums, exponentials = parts.calculate_predicted_logits(
            logits, labels, largest, first, first + logits.shape[-1]
        )
        torch.distributed.all_reduce(predicted, group=group)
        torch.distributed.all_reduce(sums, group=group)
        softmax, losses = parts.calculate_cross_entropy_loss(exponentials, predicted, sums)
        ctx.save_for_backward(softmax, elsewhere, places)
        return losses, sums.log() + largest

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        of_losses, of_log_sums = gradients
        softmax, elsewhere, places = ctx.saved_tensors
        gradient = softmax.mul_((of_losses + of_log_sums).unsqueeze(-1))  # as large as the logits: no copy of it
        rows = gradient.view(-1, gradient.shape[-1])
        rows[torch.arange(len(rows), device=rows.device), places] -= (of_losses * ~elsewhere).flatten()
        return gradient, None, None
