"""Connectors: image features -> tokens of the decoder's width.

MM1 compares average pooling, attention pooling and the C-Abstractor, and keeps the last [P]; `mlp` is LLaVA's. A
connector of the user's own is chosen by its class path (`model.connector.connector`); `Connector` says what it must
offer. Weights are replicated over tensor-parallel ranks and initialised alike on them, as all draw from torch's default
generator.
"""

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_mm1.config.schema import ConnectorConfig
from megatron_mm1.errors import ConfigError, UserError
from megatron_mm1.extension import resolve
from megatron_mm1.model.connectors.c_abstractor import CAbstractor
from megatron_mm1.model.connectors.linear import Linear
from megatron_mm1.model.connectors.mlp import MLPConnector
from megatron_mm1.model.connectors.pooling import AttentionPool, AveragePool


class Connector(Protocol):
    """What a connector must offer: a torch.nn.Module, built by `build_connector` beside the tower.

    A class of the user's own also gets `config.options` as keyword arguments.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        *,
        vision_hidden_size: int,
        hidden_size: int,
        grid: tuple[int, int],
        **options: Any,
    ) -> None:
        """Args:
        config: tokens_per_image and the shape of the built-in connectors.
        vision_hidden_size: width of the features.
        hidden_size: the decoder's width.
        grid: (rows, columns) of features of an image of model.vision.image_size.
        """

    def __call__(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """[N, rows * columns, vision_hidden_size] -> [N, tokens_per_image, hidden_size], same dtype.

        Args:
            features: row by row; N may be 0.
            grid: (rows, columns) of these features, which may differ from the constructor's.
        """
        ...


CONNECTORS: Mapping[str, Any] = {
    "average_pool": AveragePool,
    "attention_pool": AttentionPool,
    "c_abstractor": CAbstractor,
    "mlp": MLPConnector,
}


def build_connector(
    config: ConnectorConfig,
    *,
    vision_hidden_size: int,
    hidden_size: int,
    grid: tuple[int, int],
    linear: Linear = torch.nn.Linear,
) -> Connector:
    """The connector `config.connector` names: built-in, or a class of the user's own that offers what `Connector` says.

    Args:
        linear: what the built-in ones make their linear layers with.

    Raises:
        UserError: there is no such connector, or it does not take these options.
        ConfigError: its sizes do not fit together.
    """
    connector = resolve("connector", config.connector, CONNECTORS)
    if config.connector in CONNECTORS and config.options:
        raise ConfigError(
            [
                f"model.connector.options has {', '.join(sorted(config.options))}, but the built-in {config.connector} "
                "takes none: remove it"
            ]
        )
    arguments = {"vision_hidden_size": vision_hidden_size, "hidden_size": hidden_size, "grid": grid, **config.options}
    if config.connector in CONNECTORS:
        arguments["linear"] = linear
    try:
        inspect.signature(connector).bind(config, **arguments)
    except TypeError as error:
        raise UserError(
            f"connector {config.connector!r} cannot be built from (config, {', '.join(arguments)}): {error}; "
            "see model.connector.options and the Connector interface"
        ) from error
    return connector(config, **arguments)
