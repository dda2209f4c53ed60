"""MM1's image tower and connectors: pixels -> image tokens of the decoder's width. Plain torch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration_mm1 import MM1ConnectorConfig, MM1VisionConfig

Grid = tuple[int, int]
"""(rows, columns) of patches."""

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def interpolate_positions(positions: Tensor, *, from_grid: Grid, to_grid: Grid, prefix_tokens: int = 0) -> Tensor:
    """Learned positions [prefix_tokens + from_h * from_w, C] for another grid: bicubic, antialiased, in float32."""
    if from_grid == to_grid:
        return positions
    prefix, patches = positions[:prefix_tokens], positions[prefix_tokens:]
    image = patches.float().unflatten(0, from_grid).permute(2, 0, 1).unsqueeze(0)  # [1, C, h, w]
    image = functional.interpolate(image, size=to_grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix, image[0].flatten(1).T.to(positions.dtype)])


class MM1VisionAttention(nn.Module):
    """Every patch attends to every patch of its image."""

    def __init__(self, config: MM1VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[N, s, C] -> [N, s, C]."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        context = functional.scaled_dot_product_attention(query, key, value)
        return self.out_proj(context.transpose(1, 2).flatten(2))


class MM1VisionMLP(nn.Module):
    def __init__(self, config: MM1VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class MM1VisionLayer(nn.Module):
    """A pre-norm block."""

    def __init__(self, config: MM1VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = MM1VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MM1VisionMLP(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states))
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class MM1VisionEmbeddings(nn.Module):
    """Patches, and a class token in front of them where there is one, with learned positions."""

    def __init__(self, config: MM1VisionConfig) -> None:
        super().__init__()
        width, side = config.hidden_size, config.image_size // config.patch_size
        self.base_grid = (side, side)
        self.prefix_tokens = int(config.use_class_token)
        self.class_embedding = nn.Parameter(torch.zeros(width)) if config.use_class_token else None
        self.patch_embedding = nn.Conv2d(
            3, width, config.patch_size, stride=config.patch_size, bias=config.use_patch_bias
        )
        self.position_embedding = nn.Embedding(self.prefix_tokens + side * side, width)

    def forward(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        hidden_states = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [N, h * w, C]
        if self.class_embedding is not None:
            class_tokens = self.class_embedding.expand(hidden_states.shape[0], 1, -1)
            hidden_states = torch.cat([class_tokens, hidden_states], dim=1)
        return hidden_states + interpolate_positions(
            self.position_embedding.weight,
            from_grid=self.base_grid,
            to_grid=grid,
            prefix_tokens=self.prefix_tokens,
        )


class MM1VisionTower(nn.Module):
    """The vision transformer up to its feature layer."""

    def __init__(self, config: MM1VisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        width, eps = config.hidden_size, config.layer_norm_eps
        num_layers = config.num_hidden_layers + config.vision_feature_layer + 1
        self.embeddings = MM1VisionEmbeddings(config)
        self.pre_layernorm = nn.LayerNorm(width, eps=eps) if config.use_pre_layernorm else None
        self.layers = nn.ModuleList(MM1VisionLayer(config) for _ in range(num_layers))
        self.post_layernorm = nn.LayerNorm(width, eps=eps) if config.use_post_layernorm else None

    def grid(self, height: int, width: int) -> Grid:
        """(rows, columns) of patches of an image in px."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"an image of {height} x {width} px does not divide into patches of {self.patch_size} px")
        return height // self.patch_size, width // self.patch_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W], normalised -> [N, rows * columns, C], row by row, without the class token."""
        pixel_values = pixel_values.to(self.embeddings.patch_embedding.weight.dtype)
        hidden_states = self.embeddings(pixel_values, self.grid(*pixel_values.shape[-2:]))
        if self.pre_layernorm is not None:
            hidden_states = self.pre_layernorm(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        features = hidden_states[:, self.embeddings.prefix_tokens :]
        return features if self.post_layernorm is None else self.post_layernorm(features)


def pool_grid(image: Tensor, side: int) -> Tensor:
    """Adaptive average pooling to a square: [N, C, h, w] -> [N, side * side, C], row by row."""
    return functional.adaptive_avg_pool2d(image, side).flatten(2).transpose(1, 2)


class AveragePool(nn.Module):
    """Average pooling to a square of tokens, then a linear layer."""

    def __init__(self, config: MM1ConnectorConfig, *, vision_hidden_size: int, hidden_size: int, grid: Grid) -> None:
        super().__init__()
        self.side = round(config.tokens_per_image**0.5)
        self.projection = nn.Linear(vision_hidden_size, hidden_size)

    def forward(self, features: Tensor, grid: Grid) -> Tensor:
        return self.projection(pool_grid(features.transpose(1, 2).unflatten(2, grid), self.side))


class AttentionPool(nn.Module):
    """Learned queries attend to the features; a linear layer takes the result to the decoder's width."""

    def __init__(self, config: MM1ConnectorConfig, *, vision_hidden_size: int, hidden_size: int, grid: Grid) -> None:
        super().__init__()
        width = config.hidden_size
        self.queries = nn.Parameter(torch.zeros(config.tokens_per_image, width))
        self.query_layernorm = nn.LayerNorm(width)
        self.feature_layernorm = nn.LayerNorm(vision_hidden_size)
        self.attention = nn.MultiheadAttention(
            width, config.num_attention_heads, kdim=vision_hidden_size, vdim=vision_hidden_size, batch_first=True
        )
        self.projection = nn.Linear(width, hidden_size)

    def forward(self, features: Tensor, grid: Grid) -> Tensor:
        features = self.feature_layernorm(features)
        queries = self.query_layernorm(self.queries).expand(features.shape[0], -1, -1)
        pooled, _ = self.attention(queries, features, features, need_weights=False)
        return self.projection(pooled)


class ConvNorm(nn.Module):
    """Convolution without bias, layer norm over channels, and SiLU where `activation`. [N, C, h, w]."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_size: int = 1, groups: int = 1, activation: bool
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False
        )
        self.norm = nn.LayerNorm(out_channels)
        self.activation = activation

    def forward(self, image: Tensor) -> Tensor:
        image = self.norm(self.conv(image).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return functional.silu(image) if self.activation else image


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the means of all. [N, C, h, w]."""

    def __init__(self, channels: int, reduced_channels: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, reduced_channels)
        self.expand = nn.Linear(reduced_channels, channels)

    def forward(self, image: Tensor) -> Tensor:
        gate = self.expand(functional.silu(self.reduce(image.mean((2, 3))))).sigmoid()
        return image * gate[:, :, None, None]


class RegNetBlock(nn.Module):
    """A bottleneck with a depthwise 3 x 3 and squeeze-excite to a quarter of the input channels. [N, C, h, w]."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, channels, activation=True)
        self.conv2 = ConvNorm(channels, channels, kernel_size=3, groups=channels, activation=True)
        self.squeeze_excite = SqueezeExcite(channels, round(in_channels * 0.25))
        self.conv3 = ConvNorm(channels, channels, activation=False)
        same = in_channels == channels
        self.shortcut = nn.Identity() if same else ConvNorm(in_channels, channels, activation=False)

    def forward(self, image: Tensor) -> Tensor:
        residual = self.conv3(self.squeeze_excite(self.conv2(self.conv1(image))))
        return functional.silu(residual + self.shortcut(image))


class CAbstractor(nn.Module):
    """Honeybee's: positions, RegNet blocks, average pooling, RegNet blocks, and a two-layer perceptron."""

    def __init__(self, config: MM1ConnectorConfig, *, vision_hidden_size: int, hidden_size: int, grid: Grid) -> None:
        super().__init__()
        width, depth = config.hidden_size, config.num_hidden_layers
        self.side = round(config.tokens_per_image**0.5)
        self.base_grid = grid
        self.position_embeddings = nn.Parameter(torch.zeros(grid[0] * grid[1], vision_hidden_size))
        self.stage1 = nn.Sequential(*(RegNetBlock(width if i else vision_hidden_size, width) for i in range(depth)))
        self.stage2 = nn.Sequential(*(RegNetBlock(width, width) for _ in range(depth)))
        self.readout = nn.Sequential(nn.Linear(width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, features: Tensor, grid: Grid) -> Tensor:
        features = features + interpolate_positions(self.position_embeddings, from_grid=self.base_grid, to_grid=grid)
        image = self.stage1(features.transpose(1, 2).unflatten(2, grid))
        image = pool_grid(image, self.side).transpose(1, 2).unflatten(2, (self.side, self.side))
        return self.readout(self.stage2(image).flatten(2).transpose(1, 2))


class MLPConnector(nn.Module):
    """LLaVA's: Linear, GELU, Linear on each patch."""

    def __init__(self, config: MM1ConnectorConfig, *, vision_hidden_size: int, hidden_size: int, grid: Grid) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_hidden_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor, grid: Grid) -> Tensor:
        return self.linear_2(functional.gelu(self.linear_1(features)))


CONNECTORS: Mapping[str, Any] = {
    "average_pool": AveragePool,
    "attention_pool": AttentionPool,
    "c_abstractor": CAbstractor,
    "mlp": MLPConnector,
}
"""Each: [N, rows * columns, vision_hidden_size] features and their grid -> [N, tokens_per_image, hidden_size]."""
