"""A rank's parameters as parts of the whole ones, under names that no layout changes: what checkpoints are made of."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_mm1.training.build import unwrap

NAMING = {
    "non_homogeneous_layers": True,  # each layer's tensors under its own number, in the tower as in the decoder
    "chained_optim_avoid_prefix": True,
}
"""How megatron-core shall name things."""


@dataclass(frozen=True)
class Part:
    """Consecutive elements of a parameter of this rank that are a block of a whole tensor.

    Attributes:
        name: of the whole tensor.
        start: of the block in the flattened parameter.
        shape, offset: of the block in the whole tensor, of as many dimensions.
        global_shape: of the whole tensor.
        replica_id: megatron-core's; the rank that has zeros only writes the block.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]
    replica_id: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def sharded(self, prefix: str, data: Tensor) -> ShardedTensor:
        """megatron-core's description of a tensor of this block's shape, under the name with a prefix."""
        return ShardedTensor(
            key=prefix + self.name,
            data=data.view(self.shape),
            dtype=data.dtype,
            local_shape=self.shape,
            global_shape=self.global_shape,
            global_offset=self.offset,
            axis_fragmentations=None,  # blocks of the distributed optimizer form no grid
            replica_id=self.replica_id,
        )


def sharded_parameters(
    model: list[Any], *, pg_collection: ProcessGroupCollection
) -> Iterator[tuple[str, torch.nn.Parameter, ShardedTensor | ShardedTensorFactory]]:
    """Each trained parameter of this rank's stages: its name in the stage, itself, megatron-core's description."""
    metadata = {**NAMING, "dp_cp_group": pg_collection.dp_cp}
    for chunk in model:
        module = unwrap(chunk)
        described = module.sharded_state_dict(metadata=metadata)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                yield name, parameter, described[name]


def built(entry: ShardedTensor | ShardedTensorFactory) -> Iterator[ShardedTensor]:
    """The sharded tensors that a description stands for."""
    for part in nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]:
        assert isinstance(part, ShardedTensor) and part.data is not None
        yield part


def parts_of(parameter: torch.nn.Parameter, entry: ShardedTensor | ShardedTensorFactory) -> Iterator[Part]:
    """The blocks of whole tensors that a parameter consists of."""
    whole = parameter.detach()
    if is_float8tensor(whole):  # its memory holds no row of numbers that could be cut; places in one are the same
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    for piece in built(replace(entry, data=whole)):
        data = piece.data
        start = (data.data_ptr() - whole.data_ptr()) // whole.element_size()
        if not (data.is_contiguous() and 0 <= start <= parameter.numel() - data.numel()):
            raise RuntimeError(
                f"megatron-core describes {piece.key} as a copy or a strided view of its parameter, so there is no "
                "telling which of the optimizer's numbers belong to it"
            )
        yield Part(
            name=piece.key,
            start=start,
            shape=(1,) * piece.prepend_axis_num + tuple(data.shape),
            offset=tuple(piece.global_offset),
            global_shape=tuple(piece.global_shape),
            replica_id=tuple(piece.replica_id),
        )


def cut(part: Part, start: int, stop: int) -> Iterator[Part]:
    """The blocks that make up elements [start, stop) of the flattened parameter, as far as they lie in `part`.

    A range of a tensor's elements is part of a row, whole rows and part of a row, and so on within a row's rows.
    """
    begin, end = max(start - part.start, 0), min(stop - part.start, part.numel)
    if begin < end:
        for offset, shape in _blocks(part.shape, begin, end):
            yield replace(
                part,
                start=part.start + _flat(offset, part.shape),
                shape=shape,
                offset=tuple(base + own for base, own in zip(part.offset, offset, strict=True)),
            )


def _blocks(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of the blocks of a tensor that elements [begin, end) consist of, in order."""
    if not shape:
        yield (), ()
        return
    row = torch.Size(shape[1:]).numel()
    while begin < end:
        index, within = divmod(begin, row)
        if within == 0 and end - begin >= row:
            rows = (end - begin) // row
            yield (index, *(0,) * (len(shape) - 1)), (rows, *shape[1:])
            begin += rows * row
        else:
            last = min(end, (index + 1) * row)
            for offset, block in _blocks(shape[1:], within, last - index * row):
                yield (index, *offset), (1, *block)
            begin = last


def _flat(offset: tuple[int, ...], shape: tuple[int, ...]) -> int:
    position = 0
    for index, size in zip(offset, shape, strict=True):
        position = position * size + index
    return position
