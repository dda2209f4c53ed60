"""Attention and rotary embedding."""

from typing import Any

import torch

from transformer_engine.pytorch.attention.dot_product_attention import DotProductAttention

__all__ = ["DotProductAttention"]


class _SplitAlongDim:
    """torch.split, which Transformer Engine gives a backward without a copy."""

    @staticmethod
    def apply(mixed_x_layer: torch.Tensor, split_dim: int, split_size_or_sections: Any) -> tuple[torch.Tensor, ...]:
        return torch.split(mixed_x_layer, split_size_or_sections, dim=split_dim)
