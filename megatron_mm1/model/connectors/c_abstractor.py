"""The C-Abstractor of Honeybee (Cha et al., 2023, arXiv 2312.06742), MM1's final connector [P]."""

import torch
from torch import Tensor

from megatron_mm1.config.schema import ConnectorConfig
from megatron_mm1.model.connectors.linear import Linear
from megatron_mm1.model.connectors.pooling import pool_grid, token_side
from megatron_mm1.model.positions import interpolate_positions


class ConvNorm(torch.nn.Module):
    """Convolution without bias, then layer norm over channels, then SiLU where `activation`. [N, C, h, w]."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_size: int = 1, groups: int = 1, activation: bool
    ) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False
        )
        self.norm = torch.nn.LayerNorm(out_channels)
        self.activation = activation

    def forward(self, image: Tensor) -> Tensor:
        image = self.norm(self.conv(image).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return torch.nn.functional.silu(image) if self.activation else image


class SqueezeExcite(torch.nn.Module):
    """Scales each channel by a gate computed from the means of all channels. [N, C, h, w]."""

    def __init__(self, channels: int, reduced_channels: int) -> None:
        super().__init__()
        self.reduce = torch.nn.Linear(channels, reduced_channels)
        self.expand = torch.nn.Linear(reduced_channels, channels)

    def forward(self, image: Tensor) -> Tensor:
        gate = self.expand(torch.nn.functional.silu(self.reduce(image.mean((2, 3))))).sigmoid()
        return image * gate[:, :, None, None]


class RegNetBlock(torch.nn.Module):
    """RegNet bottleneck as Honeybee sets it: depthwise 3 x 3, squeeze-excite to a quarter of the *input* channels."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, channels, activation=True)
        self.conv2 = ConvNorm(channels, channels, kernel_size=3, groups=channels, activation=True)
        self.squeeze_excite = SqueezeExcite(channels, round(in_channels * 0.25))
        self.conv3 = ConvNorm(channels, channels, activation=False)
        self.shortcut = (
            torch.nn.Identity() if in_channels == channels else ConvNorm(in_channels, channels, activation=False)
        )

    def forward(self, image: Tensor) -> Tensor:
        """[N, in_channels, h, w] -> [N, channels, h, w]."""
        residual = self.conv3(self.squeeze_excite(self.conv2(self.conv1(image))))
        return torch.nn.functional.silu(residual + self.shortcut(image))


def regnet_stage(in_channels: int, channels: int, *, depth: int) -> torch.nn.Sequential:
    """`depth` blocks, the first from `in_channels`."""
    return torch.nn.Sequential(*(RegNetBlock(channels if i else in_channels, channels) for i in range(depth)))


class CAbstractor(torch.nn.Module):
    """Position embedding, RegNet blocks, adaptive average pooling, RegNet blocks, two linear layers with SiLU between.

    Positions are drawn from a truncated normal of std 0.02, everything else as torch does by default, like Honeybee. On
    another grid than the constructor's the positions are interpolated.
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
        self.side = token_side(config)
        self.base_grid = grid
        width = config.hidden_size
        self.position_embeddings = torch.nn.Parameter(torch.empty(grid[0] * grid[1], vision_hidden_size))
        torch.nn.init.trunc_normal_(self.position_embeddings, std=0.02)
        self.stage1 = regnet_stage(vision_hidden_size, width, depth=config.num_layers)
        self.stage2 = regnet_stage(width, width, depth=config.num_layers)
        self.readout = torch.nn.Sequential(
            linear(width, hidden_size), torch.nn.SiLU(), linear(hidden_size, hidden_size)
        )

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """[N, h * w, C] -> [N, tokens_per_image, hidden_size]."""
        features = features + interpolate_positions(self.position_embeddings, from_grid=self.base_grid, to_grid=grid)
        image = self.stage1(features.transpose(1, 2).unflatten(2, grid))
        image = pool_grid(image, self.side).transpose(1, 2).unflatten(2, (self.side, self.side))
        return self.readout(self.stage2(image).flatten(2).transpose(1, 2))
