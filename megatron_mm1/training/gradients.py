"""Gradient norms by component, the same number in every parallel layout."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_mm1.config.derived import COMPONENTS
from megatron_mm1.parallel.device import device
from megatron_mm1.training.build import Model, component_of, named_parameters, optimizer_parts


def component_gradient_norms(
    model: Model, optimizer: MegatronOptimizer, *, pg_collection: ProcessGroupCollection
) -> dict[str, float]:
    """L2 norm of each component's gradient over all ranks, before clipping.

    Call it between the backward pass (whose end reduces gradients) and the optimizer's step. Every rank must call it.
    """
    owned = _owned_gradients(model, optimizer)
    # Expert parameters are spread over other ranks than the rest, so their squares are summed over other groups.
    squares = torch.zeros(2, len(COMPONENTS), dtype=torch.float64, device=device())
    for name, parameter in named_parameters(model):
        gradient = owned(parameter)
        if gradient is None or not param_is_not_shared(parameter):
            continue
        if not param_is_not_tensor_parallel_duplicate(
            parameter, tp_group=pg_collection.tp, expert_tp_group=pg_collection.expt_tp
        ):
            continue
        is_expert = not getattr(parameter, "allreduce", True)
        squares[int(is_expert), list(COMPONENTS).index(component_of(name))] += gradient.double().square().sum()
    dense, expert = squares
    torch.distributed.all_reduce(dense, group=pg_collection.mp)
    torch.distributed.all_reduce(expert, group=pg_collection.tp_ep_pp)
    if model[0].ddp_config.use_distributed_optimizer:
        torch.distributed.all_reduce(dense, group=pg_collection.dp_cp)
        torch.distributed.all_reduce(expert, group=pg_collection.expt_dp)
    return dict(zip(COMPONENTS, (dense + expert).sqrt().tolist(), strict=True))


def _owned_gradients(model: Model, optimizer: MegatronOptimizer) -> Callable[[torch.nn.Parameter], torch.Tensor | None]:
    """A function from a parameter to the part of its gradient that is valid on this rank, flat; None where there is
    none.

    With the distributed optimizer gradients are reduce-scattered: only this rank's shard of the buffer holds the sum.
    """
    if not model[0].ddp_config.use_distributed_optimizer:
        return lambda parameter: getattr(parameter, "main_grad", None)
    sharded = [part for part in optimizer_parts(optimizer) if isinstance(part, DistributedOptimizer)]

    def shard(parameter: Any) -> torch.Tensor | None:
        for part in sharded:
            if parameter in part.model_param_gbuf_map:
                span = part._get_model_param_range_map(parameter)["param"]
                return parameter.main_grad.view(-1)[span.start : span.end]
        return None

    return shard
