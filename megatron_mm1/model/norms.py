"""Normalisation for the local backend."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable


class LocalNorm(torch.nn.Module):
    """RMSNorm or LayerNorm (config.normalization) over the last dimension, usable under sequence parallelism.

    megatron-core's own torch norm refuses sequence parallelism. All it takes is the mark on the parameters by which
    `finalize_model_grads` sums their gradients over the tensor-parallel ranks, each of which saw a slice of the
    sequence.

    Args:
        config: normalization, layernorm_epsilon, params_dtype and sequence_parallel are read.
        hidden_size: size of the last dimension.
        eps: added to the variance.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.shape = (hidden_size,)
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        if self.bias is not None:
            return torch.nn.functional.layer_norm(hidden_states, self.shape, self.weight, self.bias, self.eps)
        if hidden_states.device.type == "cpu" and hidden_states.dtype == torch.float32:
            if torch.is_grad_enabled():
                return _RMSNorm.apply(hidden_states, self.weight, self.eps)
            return _normalise(hidden_states, self.eps)[0].mul_(self.weight)
        return torch.nn.functional.rms_norm(hidden_states, self.shape, self.weight, self.eps)


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x of root mean square 1 in the last dimension, and what it was multiplied by [.., 1]."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * scale, scale


class _RMSNorm(torch.autograd.Function):
    """torch.nn.functional.rms_norm, which on the CPU is made of three times as many passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normalised, scale = _normalise(x, eps)
        ctx.save_for_backward(normalised, scale, weight)
        return normalised * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        normalised, scale, weight = ctx.saved_tensors
        product = (gradient * normalised).flatten(0, -2)
        mean = (product @ weight).div_(len(weight)).view(scale.shape)
        x_gradient = (gradient * weight).addcmul_(normalised, mean, value=-1).mul_(scale)
        return x_gradient, product.sum(0), None
