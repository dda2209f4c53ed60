"""Images shared out over the ranks that hold the same sequences ("data" mode of vision work).

The tower is whole on every tensor- and context-parallel rank; each encodes its share of a microbatch's images, and the
image tokens are gathered. Collectives in the tower's layers, which cost more than the tower where it is small, are not
needed.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def share_of(num_images: int, group: ProcessGroup) -> tuple[int, int]:
    """(start, stop) of the images this rank encodes: consecutive, and as many as any other rank within one."""
    each, extra = divmod(num_images, group.size())
    rank = group.rank()
    start = rank * each + min(rank, extra)
    return start, start + each + (rank < extra)


def gather_images(tokens: Tensor, num_images: int, group: ProcessGroup, *, context_group: ProcessGroup) -> Tensor:
    """Every rank's image tokens, in the order of the images.

    Tensor-parallel ranks go on with the same positions and have the same gradient of an image's tokens, context-
    parallel ranks each have that of their own positions: the backward pass adds up over the latter only and hands
    each rank its own images.

    Args:
        tokens: [this rank's images, tokens_per_image, hidden_size].
        num_images: of all ranks together.
        group: tensor- x context-parallel ranks.
        context_group: the context-parallel ones.

    Returns:
        [num_images, tokens_per_image, hidden_size].
    """
    return _GatherImages.apply(tokens, num_images, group, context_group) if num_images else tokens


class _GatherImages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, num_images: int, group: ProcessGroup, context_group: ProcessGroup) -> Tensor:
        ctx.span, ctx.context_group = share_of(num_images, group), context_group
        most = -(-num_images // group.size())
        # Collectives want equal sizes: the ranks with one image less send a row of zeros, which is left out again.
        padded = tokens.new_zeros(most, *tokens.shape[1:])
        padded[: len(tokens)] = tokens
        gathered = [torch.empty_like(padded) for _ in range(group.size())]
        torch.distributed.all_gather(gathered, padded, group=group)
        each, extra = divmod(num_images, group.size())
        return torch.cat([part[: each + (rank < extra)] for rank, part in enumerate(gathered)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, (start, stop) = gradients[0], ctx.span
        if ctx.context_group.size() > 1:
            gradient = gradient.clone()
            torch.distributed.all_reduce(gradient, group=ctx.context_group)
        return gradient[start:stop].contiguous(), None, None, None


def mark_replicated(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Undo megatron-core's mark on the parameters of a tower that is not split after all: else its gradient norm would
    count them once for each tensor-parallel rank."""
    for parameter in parameters:
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]


def broadcast_parameters(parameters: Iterable[torch.nn.Parameter], group: ProcessGroup) -> None:
    """Start alike on all ranks: on a GPU megatron-core draws the weights of a tensor-parallel layer anew on each,
    although these are not split.
    """
    for parameter in parameters:
        torch.distributed.broadcast(parameter.data, group_src=0, group=group)


def reduce_gradients(parameters: Iterable[Any], group: ProcessGroup) -> None:
    """Sum gradients over the ranks that encoded different images; all of them call it with the same parameters.

    Args:
        parameters: with `main_grad`, as megatron-core's data parallelism keeps it.
    """
    gradients = [parameter.main_grad for parameter in parameters if parameter.requires_grad]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat, group=group)
    for gradient, reduced in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(reduced.view_as(gradient))
