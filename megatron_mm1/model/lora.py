"""Low-rank adapters (LoRA, Hu et al. 2021) in the tensor-parallel linear layers of either backend.

A layer W x becomes W x + scale B A x. Of a column-parallel layer every rank has the whole A and the rows of B that
belong to its rows of W; of a row-parallel layer the columns of A that belong to its columns of W, and the whole B. What
goes between ranks is A x: `rank` numbers per position.
"""

import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import dropout, linear

from megatron_mm1.config.derived import LORA_A, LORA_B, lora_scale, lora_targets
from megatron_mm1.config.schema import LoraConfig
from megatron_mm1.parallel.device import device


class LoraLinear(torch.nn.Module):
    """What is mixed in front of a linear layer's class: parameters `lora_A` [rank, input] and `lora_B` [output, rank].

    Args:
        input_size, output_size: of the whole layer.
        lora: rank, scale and dropout.
        config: the layer's; sequence parallelism, precision and how weights are initialised are read.
        tp_group: the ranks that share the layer.
        stride: 2 where the output is two halves, as SwiGLU's gate and up, of each of which every rank has a part.
        others: the layer's further arguments.
    """

    split: ClassVar[Mapping[str, int]]
    """The dimension that ranks share of one parameter; the other is whole on each."""
    lora_A: Tensor
    lora_B: Tensor

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        lora: LoraConfig,
        config: TransformerConfig,
        tp_group: ProcessGroup,
        stride: int = 1,
        **others: Any,
    ) -> None:
        further = {"stride": stride} if stride > 1 else {}
        super().__init__(input_size, output_size, config=config, tp_group=tp_group, **further, **others)
        self.lora, self.lora_group, self.is_gated = lora, tp_group, stride > 1
        self.splits_sequence = config.sequence_parallel and tp_group.size() > 1
        shapes = {LORA_A: [lora.rank, input_size], LORA_B: [output_size, lora.rank]}
        for name, dimension in self.split.items():
            shapes[name][dimension] //= tp_group.size()
        for name, shape in shapes.items():
            parameter = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype, device=device()))
            if name in self.split:
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=self.split[name], stride=stride)
            else:  # each rank finds the gradient of its positions
                parameter.sequence_parallel = self.splits_sequence  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """A uniformly within 1 / sqrt(inputs), as peft draws it, the same in every layout; B is zeros, so that at first
        adapters change nothing.
        """
        ranks, rank = (self.lora_group.size(), self.lora_group.rank()) if LORA_A in self.split else (1, 0)
        inputs, generator = ranks * self.lora_A.shape[1], torch.Generator().manual_seed(seed)
        whole = torch.rand(self.lora.rank, inputs, generator=generator, device="cpu")
        self.lora_A.copy_((2 * whole - 1).chunk(ranks, dim=1)[rank] / inputs**0.5)

    def _dropped(self, features: Tensor, *, is_shared: bool) -> Tensor:
        """With dropout where it is set; `is_shared`: all ranks have the same features, and so draw the same numbers."""
        if not (self.training and self.lora.dropout):
            return features
        with nullcontext() if is_shared else get_cuda_rng_tracker().fork():
            return dropout(features, self.lora.dropout)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The layer's own, with A and B as parts of whole ones."""
        described: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        assert metadata is not None
        described |= make_sharded_tensors_for_checkpoint(
            {name: self.get_parameter(name) for name in (LORA_A, LORA_B)},
            prefix,
            dict(self.split),
            sharded_offsets,
            tp_group=self.lora_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.is_gated:
            described[prefix + LORA_B] = apply_swiglu_sharded_factory(described[prefix + LORA_B], sharded_offsets)
        return described


class LoraColumnParallel(LoraLinear):
    """Mixed in front of a column-parallel layer, whose input is normalised already."""

    split = MappingProxyType({LORA_B: 0})

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """[positions, 1, input] -> [positions, 1, output / ranks]; under sequence parallelism each rank gives a part of
        the positions and gets all of them."""
        output, bias = super().forward(features)
        is_shared = self.lora_group.size() > 1 and not self.splits_sequence
        low = linear(self._dropped(features, is_shared=is_shared), self.lora_A)
        spread = gather_from_sequence_parallel_region if self.splits_sequence else copy_to_tensor_model_parallel_region
        return output + linear(spread(low, group=self.lora_group) * lora_scale(self.lora), self.lora_B), bias


class LoraRowParallel(LoraLinear):
    """Mixed in front of a row-parallel layer."""

    split = MappingProxyType({LORA_A: 1})

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """[positions, 1, input / ranks] -> [positions, 1, output]; under sequence parallelism each rank gets a part of
        the positions."""
        output, bias = super().forward(features)
        low = linear(self._dropped(features, is_shared=False), self.lora_A)
        if self.splits_sequence:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.lora_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.lora_group)
        return output + linear(low * lora_scale(self.lora), self.lora_B), bias


@dataclass(frozen=True)
class Adapters:
    """Which linear layers of a component get adapters, by megatron-core's names, and what kind.

    Attributes:
        lora: of `model.lora`; None: no layer gets any.
    """

    lora: LoraConfig | None = None
    targets: frozenset[str] = frozenset()

    @classmethod
    def of(cls, lora: LoraConfig | None, component: str) -> "Adapters":
        """Of one of the model's components."""
        return cls(lora, lora_targets(lora, component))

    def column(self, name: str, layer: type) -> Any:
        """What builds the column-parallel layer `name`: its class, or that class with an adapter."""
        return self._adapted(name, layer, LoraColumnParallel)

    def row(self, name: str, layer: type) -> Any:
        """The same of a row-parallel layer."""
        return self._adapted(name, layer, LoraRowParallel)

    def _adapted(self, name: str, layer: type, mixin: type) -> Any:
        if name not in self.targets:
            return layer
        return partial(type(f"Lora{layer.__name__}", (mixin, layer), {}), lora=self.lora)


NO_ADAPTERS = Adapters()


def draw_adapters(model: torch.nn.Module, *, seed: int) -> None:
    """Draw each A of a model from a generator of its own, by the seed and its place in the whole model."""
    for name, layer in model.named_modules():
        if isinstance(layer, TransformerLayer):
            component = name.partition(".")[0]
            for place, module in layer.named_modules():
                if isinstance(module, LoraLinear):
                    key = zlib.crc32(f"{component} {layer.layer_number} {place}".encode())
                    module.draw(int(np.random.SeedSequence([seed % 2**64, key]).generate_state(1)[0]))


def with_gradient(features: Tensor) -> Tensor:
    """Features that get a gradient even where what made them is frozen: pipeline stages and recomputed layers, which
    would else have no backward pass, go by that of their input.
    """
    return features.requires_grad_() if torch.is_grad_enabled() and not features.requires_grad else features


def is_adapter(parameter_name: str) -> bool:
    """Whether a parameter, or a tensor of a checkpoint, is part of an adapter."""
    return parameter_name.endswith((f".{LORA_A}", f".{LORA_B}"))
