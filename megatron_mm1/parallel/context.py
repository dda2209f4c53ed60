"""A microbatch split over context-parallel ranks.

The T positions of a flattened microbatch are cut into 2 C equal chunks, and rank r of C holds chunks r and 2 C - 1 - r:
causal attention costs more the later a position is, and so every rank gets early and late ones. megatron-core slices
its rotary embedding the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup


def local_chunks(num_positions: int, group: ProcessGroup) -> tuple[tuple[int, int], tuple[int, int]]:
    """(start, stop) of the two chunks that this rank holds, the earlier first."""
    length = num_positions // (2 * group.size())
    late = 2 * group.size() - 1 - group.rank()
    return (group.rank() * length, (group.rank() + 1) * length), (late * length, (late + 1) * length)


def local_positions(tensor: Tensor, group: ProcessGroup, *, dim: int = 0) -> Tensor:
    """This rank's positions of a tensor that has all T of them in dimension `dim`; differentiable."""
    if group.size() == 1:
        return tensor
    chunks = [tensor.narrow(dim, start, stop - start) for start, stop in local_chunks(tensor.shape[dim], group)]
    return torch.cat(chunks, dim=dim)


def gather_positions(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """All positions, in order, of tensors [T / C, ..] that each hold a rank's own: [T, ..].

    Every rank's gradient with respect to a position is added up in the backward pass.
    """
    if group.size() == 1:
        return tensor
    gathered = gather_from_sequence_parallel_region(tensor, tensor_parallel_output_grad=True, group=group)
    by_rank = gathered.unflatten(0, (group.size(), 2, -1))  # [C, early or late, T / 2 C, ..]
    return torch.cat([by_rank[:, 0], by_rank[:, 1].flip(0)]).flatten(0, 1)


@dataclass(frozen=True)
class ChunkBoundaries:
    """What a chunk of queries attends to, for kernels that take cumulative lengths and align the causal mask at the end
    of each segment.

    Attributes:
        key_start, key_stop: the keys it needs, among all T positions.
        cu_seqlens_q, cu_seqlens_kv: [segments + 1] int32, cumulative lengths of the segments within the chunk and
            within those keys.
        max_seqlen_q, max_seqlen_kv: the longest of each.
    """

    key_start: int
    key_stop: int
    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    max_seqlen_q: int
    max_seqlen_kv: int

    @classmethod
    def of(cls, cu_seqlens: Sequence[int], start: int, stop: int, *, device: torch.device) -> "ChunkBoundaries":
        """Of the chunk [start, stop) of segments with these cumulative lengths (on the host)."""
        segments = [(first, end) for first, end in pairwise(cu_seqlens) if first < stop and end > start]
        key_start = segments[0][0]
        queries, keys = [0], [0]
        for _, end in segments:
            queries.append(min(end, stop) - start)
            keys.append(min(end, stop) - key_start)
        return cls(
            key_start=key_start,
            key_stop=stop,
            cu_seqlens_q=torch.tensor(queries, dtype=torch.int32).to(device, non_blocking=True),
            cu_seqlens_kv=torch.tensor(keys, dtype=torch.int32).to(device, non_blocking=True),
            max_seqlen_q=max(end - first for first, end in pairwise(queries)),
            max_seqlen_kv=max(end - first for first, end in pairwise(keys)),
        )
