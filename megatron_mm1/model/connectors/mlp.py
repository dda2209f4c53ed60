"""LLaVA's connector: a two-layer perceptron on each patch."""

import torch
from torch import Tensor

from megatron_mm1.config.schema import ConnectorConfig
from megatron_mm1.errors import ConfigError, UserError
from megatron_mm1.model.connectors.linear import Linear


class MLPConnector(torch.nn.Module):
    """Linear, GELU, Linear, both `hidden_size` wide: one token per patch (LLaVA-1.5; not one of MM1's)."""

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
        rows, columns = grid
        if config.tokens_per_image != rows * columns:
            raise ConfigError(
                [
                    f"model.connector.tokens_per_image is {config.tokens_per_image}, but mlp makes a token of each of "
                    f"the {rows} x {columns} = {rows * columns} patches: set it to {rows * columns}"
                ]
            )
        self.tokens_per_image = config.tokens_per_image
        self.linear_1 = linear(vision_hidden_size, hidden_size)
        self.linear_2 = linear(hidden_size, hidden_size)

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """[N, h * w, C] -> [N, h * w, hidden_size].

        Raises:
            UserError: h * w is not tokens_per_image.
        """
        rows, columns = grid
        if rows * columns != self.tokens_per_image:
            raise UserError(
                f"an image of {rows} x {columns} = {rows * columns} patches has no place in {self.tokens_per_image} "
                "token slots: the mlp connector takes images of model.vision.image_size only"
            )
        return self.linear_2(torch.nn.functional.gelu(self.linear_1(features)))
