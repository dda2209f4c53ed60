"""The optimizer's state by parameter, in a form that no layout changes.

megatron-core names the state of its chained optimizers by their number, and the distributed optimizer's by its buffers;
both depend on the layout. Here each tensor of the state is described as the part of the whole parameter that it belongs
to: a distributed optimizer's flat range as up to three blocks per matrix, so that nothing is gathered to write it, and
any layout reads the blocks that it needs. The names are megatron-core's for an optimizer that is not distributed.
AdaFactor's rows and columns are parts of whole ones in the same way (factored_state.py).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_mm1.checkpoint.format import OPTIMIZER_PREFIX
from megatron_mm1.training.build import Model, optimizer_parts
from megatron_mm1.training.factored_state import FACTORS, sharded_factors
from megatron_mm1.training.sharding import cut, parts_of, sharded_parameters

MASTER = "fp32_param"
"""The float32 copy of a bf16 weight."""


def sharded_optimizer_state(
    model: Model, optimizer: MegatronOptimizer, *, pg_collection: ProcessGroupCollection
) -> list[ShardedTensor]:
    """Every tensor of this rank's optimizer state as parts of whole tensors; they share its memory."""
    sharded = []
    parts = optimizer_parts(optimizer)
    for _, parameter, entry in sharded_parameters(model, pg_collection=pg_collection):
        for start, state, is_sharded in _states(parameter, parts):
            length = max((tensor.numel() for tensor in state.values()), default=0)
            for whole in parts_of(parameter, entry):
                for part in cut(whole, start, start + length):
                    if is_sharded:  # over the data-parallel ranks, the last number of the replica
                        part = replace(part, replica_id=(*part.replica_id[:-1], 0))
                    sharded += [
                        part.sharded(f"{OPTIMIZER_PREFIX}{kind}.", tensor.view(-1)[part.start - start :][: part.numel])
                        for kind, tensor in state.items()
                    ]
        sharded += sharded_factors(parameter, entry, parts, pg_collection=pg_collection)
    return sharded


def _states(
    parameter: torch.nn.Parameter, parts: list[MegatronOptimizer]
) -> Iterator[tuple[int, dict[str, Tensor], bool]]:
    """What this rank's optimizers keep for a parameter: (first of its elements, tensors of as many, whether other
    data-parallel ranks have the rest)."""
    for part in parts:
        if isinstance(part, DistributedOptimizer):
            if parameter in part.model_param_group_index_map:
                tensors = part._get_main_param_and_optimizer_states(parameter)
                main = tensors.pop("param")
                start = part._get_model_param_range_map(parameter)["param"].start
                yield start, _kept(parameter, main, tensors), True
        else:
            main = getattr(parameter, "main_param", parameter)
            if main in part.optimizer.state:
                yield 0, _kept(parameter, main, part.optimizer.state[main]), False


def _kept(parameter: torch.nn.Parameter, main: Tensor, state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors worth keeping: the moments, and the master weights where they are more than the weights."""
    kept = {
        kind: tensor
        for kind, tensor in state.items()
        if kind not in ("step", *FACTORS) and isinstance(tensor, Tensor) and tensor.numel() == main.numel()
    }
    if main.dtype != parameter.dtype:
        kept[MASTER] = main
    return kept


def fill_state(optimizer: MegatronOptimizer) -> None:
    """Give an optimizer that has not stepped the state it would begin with, as a place to load into."""
    for part in optimizer_parts(optimizer):
        fresh = not part.optimizer.state
        part.init_state_fn(part.optimizer, part.config)
        if fresh:
            _set_steps(part, 0)


def steps_taken(optimizer: MegatronOptimizer) -> int:
    """Adam's step count.

    Raises:
        RuntimeError: parameters differ in it, which no checkpoint could hold.
    """
    counts = set()
    for part in optimizer_parts(optimizer):
        for group in part.optimizer.param_groups:
            counts |= {int(group["step"])} if "step" in group else set()
            counts |= {
                int(part.optimizer.state[parameter]["step"])
                for parameter in group["params"]
                if "step" in part.optimizer.state.get(parameter, {})
            }
    if len(counts) > 1:
        raise RuntimeError(f"parameters have taken different numbers of optimizer steps: {sorted(counts)}")
    return counts.pop() if counts else 0


def set_steps_taken(optimizer: MegatronOptimizer, steps: int) -> None:
    """Set Adam's step count of every parameter."""
    for part in optimizer_parts(optimizer):
        _set_steps(part, steps)


def _set_steps(part: MegatronOptimizer, steps: int) -> None:
    # torch's AdamW counts by parameter, in a tensor of its own each; Transformer Engine's by group.
    by_parameter = isinstance(part.optimizer, torch.optim.AdamW)
    for group in part.optimizer.param_groups:
        if not by_parameter:
            group["step"] = steps
            continue
        for parameter in group["params"]:
            if parameter in part.optimizer.state:
                part.optimizer.state[parameter]["step"] = torch.tensor(float(steps), device=parameter.device)
