"""AdaFactor's rows and columns of second moments as parts of those of the whole parameters, for checkpoints."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_mm1.checkpoint.format import OPTIMIZER_PREFIX
from megatron_mm1.training.adafactor import COLUMN, ROW, split_dimension
from megatron_mm1.training.sharding import Part, parts_of

FACTORS = {ROW: -1, COLUMN: -2}
"""By kind of state, the dimension of the parameter that it lacks."""


def sharded_factors(
    parameter: torch.nn.Parameter,
    entry: ShardedTensor | ShardedTensorFactory,
    parts: Sequence[MegatronOptimizer],
    *,
    pg_collection: ProcessGroupCollection,
) -> Iterator[ShardedTensor]:
    """Rows and columns that this rank's optimizers keep for a parameter; they share their memory."""
    main = getattr(parameter, "main_param", parameter)
    state: Mapping[str, Tensor] = next(
        (part.optimizer.state[main] for part in parts if main in part.optimizer.state), {}
    )
    is_expert = not getattr(parameter, "allreduce", True)
    tp_group = pg_collection.expt_tp if is_expert else pg_collection.tp
    for kind, dimension in FACTORS.items():
        if kind not in state:
            continue
        described = {}
        for whole in parts_of(parameter, entry):
            part = _without(whole, dimension)
            if split_dimension(parameter) == dimension:  # the ranks that share it have all of the rest
                part = replace(part, replica_id=(*part.replica_id, tp_group.rank()))
            # Blocks of rows, as SwiGLU's two, have a row each and a column in common.
            described[part.name, part.offset] = part.sharded(
                f"{OPTIMIZER_PREFIX}{kind}.", _stretch(state[kind], parameter, whole, dimension)
            )
        yield from described.values()


def _without(part: Part, dimension: int) -> Part:
    """The block that is left of a block when a dimension goes."""

    def left(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(size for place, size in enumerate(sizes) if place != len(sizes) + dimension)

    return replace(part, shape=left(part.shape), offset=left(part.offset), global_shape=left(part.global_shape))


def _stretch(factor: Tensor, parameter: torch.nn.Parameter, part: Part, dimension: int) -> Tensor:
    """What belongs to a block of the parameter: the row elements of its rows, or all of a column."""
    if dimension == -2:
        if parameter.dim() > 2 and part.numel != parameter.numel():
            raise RuntimeError(f"{part.name} is part of a stack of matrices, whose columns cannot be told apart")
        return factor
    length = parameter.shape[-1]
    return factor.view(-1)[part.start // length :][: part.numel // length]
