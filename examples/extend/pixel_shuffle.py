"""A connector of one's own: neighbouring patches side by side in one token.

`--model.connector.connector pixel_shuffle.PixelShuffle --model.connector.options '{factor: 2}'`
"""

import torch
from torch import Tensor

from megatron_mm1.config import ConnectorConfig
from megatron_mm1.errors import ConfigError


class PixelShuffle(torch.nn.Module):
    """factor x factor patches are concatenated and projected: grid / factor^2 tokens per image."""

    def __init__(
        self,
        config: ConnectorConfig,
        *,
        vision_hidden_size: int,
        hidden_size: int,
        grid: tuple[int, int],
        factor: int = 2,
    ) -> None:
        super().__init__()
        tokens = grid[0] * grid[1] // factor**2
        if grid[0] % factor or grid[1] % factor or tokens != config.tokens_per_image:
            made = f"{grid[0]} x {grid[1]} patches by {factor} x {factor} make {tokens} tokens"
            raise ConfigError([f"{made}, not {config.tokens_per_image}: set model.connector.tokens_per_image"])
        self.unshuffle = torch.nn.PixelUnshuffle(factor)
        self.projection = torch.nn.Linear(vision_hidden_size * factor**2, hidden_size)

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """[N, rows * columns, C] -> [N, tokens_per_image, hidden_size]."""
        plane = features.transpose(1, 2).unflatten(2, grid)  # [N, C, rows, columns]
        return self.projection(self.unshuffle(plane).flatten(2).transpose(1, 2))
