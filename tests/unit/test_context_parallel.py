"""Sequences split over context-parallel ranks: who holds what, and what each part attends to."""

from itertools import pairwise

import pytest
import torch

from megatron_mm1.data.batch import Boundaries
from megatron_mm1.model.attention import segment_mask
from megatron_mm1.parallel.context import ChunkBoundaries, local_chunks, local_positions
from tests.absent_ranks import Ranks

SEGMENTS = torch.tensor([[1] * 5 + [2] * 1 + [3] * 14 + [0] * 4, [1] * 24], dtype=torch.int32)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_every_position_is_on_one_rank(count):
    held = torch.cat([local_positions(torch.arange(48), Ranks(rank, count)) for rank in range(count)])
    assert held.sort().values.tolist() == list(range(48))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_causal_work_is_the_same_on_every_rank(count):
    work = [local_positions(torch.arange(48), Ranks(rank, count)).sum() for rank in range(count)]
    assert len(set(map(int, work))) == 1


@pytest.mark.parametrize("count", [2, 3, 4])
def test_masks_of_the_ranks_are_rows_of_the_whole_one(count):
    rows, length = SEGMENTS.shape
    whole = torch.zeros(rows, length, rows, length, dtype=torch.bool)
    for row in range(rows):
        whole[row, :, row] = segment_mask(SEGMENTS)[row, 0]
    whole = whole.reshape(rows * length, rows * length)
    for rank in range(count):
        ours = segment_mask(SEGMENTS, Ranks(rank, count))
        assert torch.equal(ours[0, 0], local_positions(whole, Ranks(rank, count)))


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_chunk_boundaries_give_the_attention_of_the_whole(count):
    """A plain kernel that takes cumulative lengths, with the causal mask aligned at the end of each segment."""
    cumulative = Boundaries.of(SEGMENTS).on_host
    total = cumulative[-1]
    query, key, value = torch.randn(3, total, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = torch.cat(
        [attend(query[first:end], key[first:end], value[first:end]) for first, end in pairwise(cumulative)]
    )
    for rank in range(count):
        for start, stop in local_chunks(total, Ranks(rank, count)):
            chunk = ChunkBoundaries.of(cumulative, start, stop, device=torch.device("cpu"))
            queries = query[start:stop]
            keys, values = (x[chunk.key_start : chunk.key_stop] for x in (key, value))
            assert int(chunk.cu_seqlens_q[-1]) == len(queries) and int(chunk.cu_seqlens_kv[-1]) == len(keys)
            assert chunk.max_seqlen_q == int(chunk.cu_seqlens_q.diff().max())
            assert chunk.max_seqlen_kv == int(chunk.cu_seqlens_kv.diff().max())
            parts = zip(
                queries.tensor_split(chunk.cu_seqlens_q[1:-1].long()),
                keys.tensor_split(chunk.cu_seqlens_kv[1:-1].long()),
                values.tensor_split(chunk.cu_seqlens_kv[1:-1].long()),
                strict=True,
            )
            torch.testing.assert_close(torch.cat([attend(*part) for part in parts]), whole[start:stop])


def attend(query, key, value):
    """Causal attention of the last len(query) positions of a segment."""
    late = len(key) - len(query)
    allowed = torch.ones(len(query), len(key), dtype=torch.bool).tril(late)
    return torch.nn.functional.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=allowed)[0]
