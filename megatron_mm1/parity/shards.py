"""Parameters that are spread over ranks, compared shard by shard with the whole ones of a single process.

megatron-core's description of a distributed checkpoint says which part of which parameter a rank holds, under names
that no layout changes. Nothing is gathered: each rank compares what it has with its slice of the reference.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_mm1.training.build import Model
from megatron_mm1.training.sharding import built, sharded_parameters


@dataclass(frozen=True)
class Shard:
    """This rank's part of a parameter, or of something of its shape.

    Attributes:
        name: the parameter's, the same in every layout.
        offset: where the part lies in the whole, by dimension.
        shape: of the whole.
        data: of the part, with as many dimensions as the whole.
    """

    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    data: Tensor

    def of(self, whole: Tensor) -> Tensor:
        """The same part of another tensor of the whole's shape."""
        return whole[tuple(slice(o, o + n) for o, n in zip(self.offset, self.data.shape, strict=True))]


def shards(
    model: Model, value_of: Callable[[torch.nn.Parameter], Tensor], *, pg_collection: ProcessGroupCollection
) -> Iterator[Shard]:
    """Shards of `value_of` each trained parameter of this rank (the parameter, its gradient), which has its shape."""
    for _, parameter, entry in sharded_parameters(model, pg_collection=pg_collection):
        value = value_of(parameter).detach().view_as(parameter)
        # A gradient may be float32 where its parameter is bf16.
        fields = {"dtype": value.dtype} if isinstance(entry, ShardedTensor) else {}
        for part in built(replace(entry, data=value, **fields)):
            data = part.data[(None,) * part.prepend_axis_num]
            yield Shard(part.key, tuple(part.global_offset), tuple(part.global_shape), data)


def whole_tensors(parts: Iterator[Shard]) -> dict[str, Tensor]:
    """The whole of each parameter, from the shards of a process that has all of them."""
    whole: dict[str, Tensor] = {}
    for part in parts:
        if part.name not in whole:
            whole[part.name] = torch.full(part.shape, float("nan"), dtype=torch.float32)
        part.of(whole[part.name]).copy_(part.data)
    return whole


Squares = dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], float]]
"""By parameter and (offset, shape) of the shard: the squared norm of the difference from the reference."""


def squared_errors(parts: Iterator[Shard], reference: Mapping[str, Tensor]) -> Squares:
    """How far this rank's shards are from the reference; a parameter that the reference lacks, or has in another shape,
    is infinitely far."""
    squares: Squares = {}
    for part in parts:
        whole = reference.get(part.name)
        error = float("inf")
        if whole is not None and whole.shape == part.shape:
            error = float((part.data.double().cpu() - part.of(whole).double()).square().sum())
            error = float("inf") if math.isnan(error) else error  # which comparisons pass over
        squares.setdefault(part.name, {})[part.offset, tuple(part.data.shape)] = error
    return squares


def norms_of(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(tensor.double().norm()) for name, tensor in tensors.items()}


def relative_errors(
    ranks: list[Squares], reference: Mapping[str, Tensor], *, scales: Mapping[str, float]
) -> dict[str, float]:
    """||difference|| / scale of each parameter.

    Where ranks hold copies the worst one counts. A parameter is infinitely far where a part of it is on no rank.
    """
    errors = {}
    for name, whole in reference.items():
        worst: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
        for squares in ranks:
            for place, error in squares.get(name, {}).items():
                worst[place] = max(worst.get(place, 0.0), error)
        covered = sum(torch.Size(shape).numel() for _, shape in worst)
        error = sum(worst.values()) ** 0.5 if covered == whole.numel() else float("inf")
        errors[name] = error / scales[name]
    extra = {name for squares in ranks for name in squares} - set(reference)
    return errors | dict.fromkeys(extra, float("inf"))


def complete_gradients(chunk: DistributedDataParallel) -> None:
    """Make every rank's `main_grad` whole where the distributed optimizer left each data-parallel rank a shard."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for groups in (chunk.bucket_groups, chunk.expert_parallel_bucket_groups):
        for group in groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                mine = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, mine, group=ranks)
