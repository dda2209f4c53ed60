"""Transformer Engine's linear layer as part of a module of plain torch. Imported only where Transformer Engine is."""

import torch
from torch import Tensor
from transformer_engine.pytorch import Linear


class PaddedLinear(Linear):
    """torch.nn.Linear by Transformer Engine: the same parameters, initial weights and result.

    Args:
        row_multiple: the kernel gets so many rows or a multiple, at least one: rows of zeros are added and taken away.
    """

    def __init__(self, in_features: int, out_features: int, *, row_multiple: int) -> None:
        super().__init__(in_features, out_features)
        self.row_multiple = row_multiple
        plain = torch.nn.Linear(in_features, out_features)
        with torch.no_grad():
            self.weight.copy_(plain.weight)
            self.bias.copy_(plain.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        rows = features.flatten(0, -2)
        missing = max(self.row_multiple, -(-len(rows) // self.row_multiple) * self.row_multiple) - len(rows)
        output = super().forward(torch.nn.functional.pad(rows, (0, 0, 0, missing)))
        return output[: len(rows)].unflatten(0, features.shape[:-1])
