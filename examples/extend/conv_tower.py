"""A vision tower of one's own: a small convolutional network. `--model.vision.tower conv_tower.ConvTower`"""

from itertools import pairwise

import torch
from torch import Tensor

from megatron_mm1.config import VisionConfig
from megatron_mm1.errors import UserError

STRIDE = 8


class ConvTower(torch.nn.Module):
    """Three strided convolutions: one feature for each 8 x 8 px.

    Plain modules are replicated over tensor-parallel ranks, which see the same images and compute the same gradients.
    """

    def __init__(self, config: VisionConfig, *, transformer_config, layer_spec, pg_collection) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        widths = [3, config.hidden_size // 4, config.hidden_size // 2, config.hidden_size]
        layers: list[torch.nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [torch.nn.Conv2d(fan_in, fan_out, kernel_size=3, stride=2, padding=1), torch.nn.SiLU()]
        self.layers = torch.nn.Sequential(*layers, torch.nn.GroupNorm(8, config.hidden_size))
        self.to(transformer_config.params_dtype)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        if height % STRIDE or width % STRIDE:
            raise UserError(f"an image of {height} x {width} px is not a multiple of {STRIDE} px")
        return height // STRIDE, width // STRIDE

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, H / 8 * W / 8, hidden_size]; N may be 0."""
        features = self.layers(pixels.to(self.layers[0].weight.dtype))
        return features.flatten(2).transpose(1, 2)
