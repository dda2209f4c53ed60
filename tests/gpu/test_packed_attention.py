"""Attention over packed examples by torch's and Transformer Engine's kernels, also in parts, beside a dense mask."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_mm1.data.batch import Boundaries
from megatron_mm1.model import packed_attention
from megatron_mm1.model.packed_attention import ContextParallelParams, PackedAttention
from megatron_mm1.parallel.context import ChunkBoundaries, local_chunks, local_positions
from megatron_mm1.parallel.device import device
from tests.absent_ranks import Ranks
from tests.gpu.comparison import BF16_ROUNDING, relative_error
from tests.gpu.marks import TRANSFORMER_ENGINE

pytestmark = TRANSFORMER_ENGINE

LENGTHS = {
    "unaligned": (1, 2, 3, 61, 129, 4, 56),
    "one example": (256,),
    "single positions": (1,) * 32,
    "one long, many short": (977, *(1,) * 7, 40),
}
HEADS = {"head dim 64": (4, 4, 64), "grouped, 128": (8, 2, 128), "head dim 80": (4, 4, 80)}
KERNELS = ("torch", "transformer_engine")
TOLERANCE = 8 * BF16_ROUNDING
"""bf16's probabilities and output, and in the gradients two more products of rounded numbers."""
FLOAT32_ROUNDING = 1e-5
"""Of sums of tens of numbers near 1."""


def inputs(positions: int, heads: int, groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and the gradient of the result: [T, heads, head_dim] in bf16."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(positions, number, head_dim) for number in (heads, groups, groups, heads)]
    query, key, value, gradient = (torch.randn(shape, generator=generator).bfloat16().to(device()) for shape in shapes)
    return query, key, value, gradient


def dense_attention(query: Tensor, key: Tensor, value: Tensor, segment_ids: Tensor) -> Tensor:
    """Causal attention within segments in float32, spelled out: [T, heads, head_dim] -> [T, heads * head_dim]."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (x.float().transpose(0, 1) for x in (query, key, value))
    key, value = (x.repeat_interleave(groups, dim=0) for x in (key, value))
    allowed = (segment_ids[:, None] == segment_ids[None, :]).tril()
    scores = (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(dim=-1) @ value).transpose(0, 1).flatten(1)


def segments(lengths: tuple[int, ...]) -> Tensor:
    """[T] number of the example that a position belongs to."""
    return torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths)).to(device())


def with_gradients(attend, *leaves: Tensor, gradient: Tensor) -> list[Tensor]:
    """The result of `attend` and the gradients of its arguments."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    output = attend(*leaves)
    output.backward(gradient.reshape(output.shape).to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    """Within TOLERANCE of the size of each; or, where terms of that size cancel to nothing, within float32 of nothing:
    an example of one position has no gradient by its query and key."""
    for name, ours, theirs in zip(("output", "query", "key", "value"), got, expected, strict=True):
        theirs = theirs.reshape(ours.shape)
        largest_difference = float((ours.float() - theirs).abs().max())
        assert largest_difference < FLOAT32_ROUNDING or relative_error(ours, theirs) < TOLERANCE, name


def build(cls, groups, *, heads: int, query_groups: int, head_dim: int):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_query_groups=query_groups,
        kv_channels=head_dim,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    return cls(
        config,
        layer_number=1,
        attn_mask_type=AttnMaskType.padding_causal,
        attention_type="self",
        pg_collection=groups,
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_examples(groups, lengths, heads, kernel):
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.packed_seq_params import PackedSeqParams

    cls = PackedAttention if kernel == "torch" else TEDotProductAttention

    num_heads, query_groups, head_dim = HEADS[heads]
    ids = segments(LENGTHS[lengths])
    query, key, value, gradient = inputs(len(ids), num_heads, query_groups, head_dim)
    boundaries = Boundaries.of(ids.cpu()[None])
    cu_seqlens = boundaries.cu_seqlens.to(device())
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=boundaries.max_seqlen,
        max_seqlen_kv=boundaries.max_seqlen,
    )
    attention = build(cls, groups, heads=num_heads, query_groups=query_groups, head_dim=head_dim)

    def packed(*qkv: Tensor) -> Tensor:
        return attention(*qkv, None, AttnMaskType.padding_causal, packed_seq_params=params)

    expected = with_gradients(
        lambda *qkv: dense_attention(*qkv, ids), *(x.float() for x in (query, key, value)), gradient=gradient
    )
    assert_close(with_gradients(packed, query, key, value, gradient=gradient), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_parts_of_context_parallel_ranks(groups, lengths, count, kernel, monkeypatch):
    """What each rank of a context-parallel group computes, one after the other; what they would gather is at hand."""
    from megatron_mm1.model.te_attention import ContextParallelAttention

    cls = PackedAttention if kernel == "torch" else ContextParallelAttention
    ids = segments(LENGTHS[lengths])
    ids = torch.cat([ids, ids.new_zeros(-len(ids) % (2 * count))])  # padding is an example of its own
    query, key, value, gradient = inputs(len(ids), 4, 2, 64)
    on_host = Boundaries.of(ids.cpu()[None]).on_host
    attention = build(cls, groups, heads=4, query_groups=2, head_dim=64)

    def in_parts(*qkv: Tensor) -> Tensor:
        whole = torch.empty_like(qkv[0]).flatten(1)
        for rank in range(count):
            ranks = Ranks(rank, count)
            chunks = tuple(
                ChunkBoundaries.of(on_host, start, stop, device=device())
                for start, stop in local_chunks(len(ids), ranks)
            )
            params = ContextParallelParams(chunks=chunks)
            mine = (local_positions(x, ranks).unsqueeze(1) for x in qkv)
            monkeypatch.setattr(packed_attention, "gather_positions", lambda local, group: torch.stack(qkv[1:], dim=1))
            output = attention(*mine, None, packed_seq_params=params).squeeze(1)
            index = local_positions(torch.arange(len(ids), device=device()), ranks)
            whole = whole.index_copy(0, index, output)
        return whole

    expected = with_gradients(
        lambda *qkv: dense_attention(*qkv, ids), *(x.float() for x in (query, key, value)), gradient=gradient
    )
    assert_close(with_gradients(in_parts, query, key, value, gradient=gradient), expected)
