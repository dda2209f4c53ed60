"""A model's tensors by the names they have in a checkpoint, in memory: megatron-core's sharded state dict says them."""

from collections.abc import Iterator, Mapping

import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_mm1.training.sharding import NAMING


def randomize(model: torch.nn.Module, *, seed: int = 0, std: float = 0.15) -> None:
    """Every parameter random and distinct, norms and biases too, so that a swapped pair shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=std, generator=generator)
            if ("norm" in name or "ln_" in name) and name.endswith("weight"):
                parameter.add_(1.0)


def canonical_state(model: torch.nn.Module, groups: ProcessGroupCollection) -> dict[str, Tensor]:
    """Copies of the tensors of a model that is whole in this process."""
    state: dict[str, Tensor] = {}
    for shard in _shards(model, groups):
        whole = state.setdefault(shard.key, torch.full(shard.global_shape, torch.nan, dtype=shard.dtype))
        whole[shard.global_slice()] = shard.data.detach()
    return state


def load_canonical(model: torch.nn.Module, state: Mapping[str, Tensor], groups: ProcessGroupCollection) -> None:
    """Fill a model, or this rank's part of it, from whole tensors."""
    with torch.no_grad():
        for shard in _shards(model, groups):
            shard.data.copy_(state[shard.key][shard.global_slice()])


def _shards(model: torch.nn.Module, groups: ProcessGroupCollection) -> Iterator[ShardedTensor]:
    """The model's own memory, in pieces: `data` are views of its parameters."""
    state = model.sharded_state_dict(metadata={**NAMING, "dp_cp_group": groups.dp_cp})
    apply_factories(state)
    tensors, _ = extract_matching_values(state, lambda value: isinstance(value, ShardedTensor))

    def leaves(node) -> Iterator[ShardedTensor]:
        if isinstance(node, ShardedTensor):
            yield node
        else:
            for child in node.values() if isinstance(node, dict) else node:
                yield from leaves(child)

    yield from leaves(tensors)
