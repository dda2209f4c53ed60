"""The decoder's gated activation for the local backend."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable


class SwiGLU(torch.nn.Module):
    """silu(gate) * up, without megatron-core's passes over memory that have no Transformer Engine to fuse them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """[..., 2 * width], the gates before the values they gate -> [..., width]."""
        if torch.is_grad_enabled():
            return _SwiGLU.apply(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        opened = torch.nn.functional.silu(gate)
        ctx.save_for_backward(gate_and_up, opened)
        return opened * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gate_and_up, opened = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        gate_gradient, up_gradient = result.chunk(2, dim=-1)
        torch.mul(gradient, opened, out=up_gradient)
        torch.mul(gradient, up, out=gate_gradient)
        torch.ops.aten.silu_backward(gate_gradient, gate, grad_input=gate_gradient)
        return result
