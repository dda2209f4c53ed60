"""Checkpoints of format 1, whose distributed optimizer's state was cut as the layout that wrote it cut its buffers."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm1.config import MM1Config
from megatron_mm1.errors import UserError
from megatron_mm1.training.build import Model, optimizer_parts, unwrap
from megatron_mm1.training.sharding import NAMING

_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "use_distributed_optimizer",
    "overlap_grad_reduce",
    "vision_parallel_mode",
    "decoder_first_pipeline_num_layers",
    "hybrid_layer_pattern",
)


def check_layout(saved: MM1Config, config: MM1Config) -> None:
    """Refuse another layout than the one that wrote a distributed optimizer's state; its data-parallel size may differ.

    Raises:
        UserError: listing what differs.
    """
    differences = [
        f"parallel.{name} was {before} and is {now}"
        for name in _LAYOUT
        if (before := getattr(saved.parallel, name)) != (now := getattr(config.parallel, name))
    ]
    if differences:
        raise UserError(
            "a checkpoint of format 1 with a distributed optimizer resumes in the layout that wrote it only: "
            f"{'; '.join(differences)}; resume it there once, and save: the new checkpoint loads in any layout"
        )


def distributed_optimizer_state(
    model: Model, optimizer: MegatronOptimizer, *, pg_collection: ProcessGroupCollection
) -> dict[str, Any]:
    """What to read of a distributed optimizer's state, in place of the state that it has."""
    metadata = {**NAMING, "distrib_optim_sharding_type": "dp_reshardable", "dp_cp_group": pg_collection.dp_cp}
    stages = {f"stage {n}": unwrap(chunk).sharded_state_dict(metadata=metadata) for n, chunk in enumerate(model)}
    state: dict[str, Any] = optimizer.sharded_state_dict(stages, is_loading=True, metadata=metadata)
    return state


def load_distributed_optimizer_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> int:
    """Take over what was read; returns Adam's step count."""
    with torch.no_grad():
        optimizer.load_state_dict(loaded)
    return max(int(group.get("step", 0)) for part in _distributed(optimizer) for group in part.optimizer.param_groups)


def plain_steps_taken(common: Any) -> int:
    """Adam's step count in what format 1 kept of an optimizer that was not distributed, alone or chained."""
    if isinstance(common, dict):
        if "common_step" in common:
            return int(common["common_step"])
        return max((plain_steps_taken(value) for value in common.values()), default=0)
    return 0


def _distributed(optimizer: MegatronOptimizer) -> Iterator[DistributedOptimizer]:
    return (part for part in optimizer_parts(optimizer) if isinstance(part, DistributedOptimizer))
