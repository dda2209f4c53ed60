"""Which layers of Transformer Engine a model of any size is made of, on any rank of any layout: found out in one
process, with groups that communicate with nobody and weights without memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_mm1.config import MM1Config
from megatron_mm1.model.mm1 import MM1Model
from megatron_mm1.model.packed_attention import CAUSAL, PackedAttention
from megatron_mm1.parallel.groups import build_process_groups, destroy_process_groups
from tests.te_jobs import layers_of, te_class

_BUFFERS = ("empty", "zeros", "ones", "full", "empty_like")


class _WithoutMemory(TorchFunctionMode):
    """Parameters are made on the meta device, also where another is asked for."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", None) in _BUFFERS:
            kwargs = dict(kwargs or {}, device="meta")
        return function(*args, **(kwargs or {}))


@contextmanager
def _rank_of(rank: int, world_size: int) -> Iterator[None]:
    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        destroy_process_groups()
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class Layer:
    """A layer of Transformer Engine, or torch's attention in one's place: its class, what it was constructed with, and
    the shapes of its weights."""

    kind: str
    arguments: dict[str, Any]
    tp_size: int
    shapes: dict[str, tuple[int, ...]]
    dtypes: frozenset[torch.dtype]


def layers_on(config: MM1Config, *, rank: int, world_size: int) -> dict[str, Layer]:
    """The layers on one rank, by name."""
    with _rank_of(rank, world_size):
        groups = build_process_groups(config.parallel, seed=1)
        with _WithoutMemory():
            model = MM1Model(config, backend="transformer_engine", pg_collection=groups)
        attention = {
            name: Layer("PackedAttention", {"causal": module.window == CAUSAL}, 1, {}, frozenset())
            for name, module in model.named_modules()
            if isinstance(module, PackedAttention)
        }
        return attention | {name: _describe(layer) for name, layer in layers_of(model).items()}


def _describe(layer: Any) -> Layer:
    group = layer.te_arguments.get("tp_group")
    plain = (bool, int, float, str, torch.dtype, type(None))
    return Layer(
        kind=te_class(layer),
        arguments={name: value for name, value in layer.te_arguments.items() if isinstance(value, plain)},
        tp_size=group.size() if group is not None else layer.te_arguments.get("tp_size", 1),
        shapes={name: tuple(parameter.shape) for name, parameter in layer.named_parameters()},
        dtypes=frozenset(parameter.dtype for parameter in layer.parameters()),
    )
