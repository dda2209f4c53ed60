"""Average pooling and attention pooling."""

import math

import torch
from torch import Tensor

from megatron_mm1.config.schema import ConnectorConfig
from megatron_mm1.errors import ConfigError
from megatron_mm1.model.connectors.linear import Linear


def token_side(config: ConnectorConfig) -> int:
    """Side of the square that `tokens_per_image` tokens make.

    Raises:
        ConfigError: they make none.
    """
    side = math.isqrt(config.tokens_per_image)
    if side * side != config.tokens_per_image:
        raise ConfigError(
            [
                f"model.connector.tokens_per_image is {config.tokens_per_image}, but {config.connector} makes a square "
                f"of tokens: use {side * side} or {(side + 1) ** 2}"
            ]
        )
    return side


def pool_grid(image: Tensor, side: int) -> Tensor:
    """Adaptive average pooling to a square: [N, C, h, w] -> [N, side * side, C], row by row."""
    return torch.nn.functional.adaptive_avg_pool2d(image, side).flatten(2).transpose(1, 2)


class AveragePool(torch.nn.Module):
    """Average pooling to n x n tokens, then a linear layer [P]; adaptive, so that 27 x 27 patches become 12 x 12."""

    def __init__(
        self,
        config: ConnectorConfig,
        *,
        vision_hidden_size: int,
        hidden_size: int,
        grid: tuple[int, int],
        linear: Linear = torch.nn.Linear,
    ) -> None:
        super().__init__()
        self.side = token_side(config)
        self.projection = linear(vision_hidden_size, hidden_size)

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """[N, h * w, C] -> [N, tokens_per_image, hidden_size]."""
        return self.projection(pool_grid(features.transpose(1, 2).unflatten(2, grid), self.side))


class AttentionPool(torch.nn.Module):
    """k learned queries attend to the features, and a linear layer takes the result to the decoder's width [P].

    The paper says no more. The attention is CoCa's pooler [C]: layer norms on queries and features, one multi-head
    attention of width `config.hidden_size`, no feed-forward layer; queries are drawn from N(0, 1). Any grid will do, as
    it knows no positions but those the features carry.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        *,
        vision_hidden_size: int,
        hidden_size: int,
        grid: tuple[int, int],
        linear: Linear = torch.nn.Linear,
    ) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        if width % heads:
            raise ConfigError(
                [
                    f"model.connector.hidden_size {width} is not divisible by model.connector.num_attention_heads "
                    f"{heads}: change one of them"
                ]
            )
        self.queries = torch.nn.Parameter(torch.randn(config.tokens_per_image, width))
        self.query_layernorm = torch.nn.LayerNorm(width)
        self.feature_layernorm = torch.nn.LayerNorm(vision_hidden_size)
        self.attention = torch.nn.MultiheadAttention(
            width, heads, kdim=vision_hidden_size, vdim=vision_hidden_size, batch_first=True
        )
        self.projection = linear(width, hidden_size)

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """[N, h * w, C] -> [N, tokens_per_image, hidden_size]."""
        features = self.feature_layernorm(features)
        queries = self.query_layernorm(self.queries).expand(features.shape[0], -1, -1)
        pooled, _ = self.attention(queries, features, features, need_weights=False)
        return self.projection(pooled)
