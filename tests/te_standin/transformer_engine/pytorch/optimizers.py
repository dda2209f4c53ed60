"""FusedAdam, and the functions on lists of tensors that megatron-core's optimizers and clipping use."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from transformer_engine._release import released


class FusedAdam(torch.optim.AdamW):
    """torch's AdamW under FusedAdam's signature. Like FusedAdam it counts steps per group, not per parameter."""

    @released(
        "pytorch/optimizers/fused_adam.py", "params", "lr", "betas", "eps", "weight_decay", "store_param_remainders"
    )
    def __init__(self, arguments: SimpleNamespace) -> None:
        torch.optim.AdamW.__init__(
            self,
            arguments.params,
            lr=arguments.lr,
            betas=arguments.betas,
            eps=arguments.eps,
            weight_decay=arguments.weight_decay,
        )


class FusedSGD(torch.optim.SGD):
    """megatron-core imports it; megatron_mm1 trains with Adam."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("the stand-in has no FusedSGD")


def multi_tensor_applier(
    operation: Callable[..., Any], noop_flag_buffer: Tensor, tensor_lists: list[list[Tensor]], *args: Any
) -> Any:
    return operation(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor | None]:
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return norms.norm().view(1), norms if per_tensor else None


def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_scale_tensor(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: Tensor
) -> None:
    multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale)  # type: ignore[arg-type]
