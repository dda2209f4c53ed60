"""Attention within packed examples by the flash kernels that torch brings, for the Transformer Engine backend.

Transformer Engine has no kernels of its own: it takes flash-attn's where that package is installed, cuDNN's where its
version will do, and else multiplies whole matrices of scores. torch's kernels are always there. On an H200, a step of
two of the 30B's blocks took 896 ms with them and 3,002 ms with whole matrices (docs/fp8.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.attention.varlen import varlen_attn

from megatron_mm1.model.attention import LocalAttention
from megatron_mm1.parallel.context import ChunkBoundaries, gather_positions

CAUSAL = (-1, 0)
FULL = (-1, -1)
"""Keys to the left and right of a query's own that it sees; -1: all of its example's."""


@dataclass
class ContextParallelParams(PackedSeqParams):
    """The boundaries of this rank's two chunks, in the argument that megatron-core hands down to attention.

    Rotary positions run on over the flattened microbatch: qkv_format is not "thd", and max_seqlen_q is T, so that
    megatron-core slices its rotary embedding by context-parallel rank.
    """

    chunks: tuple[ChunkBoundaries, ...] = ()


@dataclass
class EqualExamples(PackedSeqParams):
    """The boundaries of examples of one length, and that they are: numbers on the host, for attention in one batch.

    Positions after the last of them are padding, whose attention nobody needs.
    """

    examples: int = 0
    length: int = 0


class PackedAttention(LocalAttention):
    """torch's variable-length attention behind megatron-core's core-attention interface, in bf16.

    Three uses: the decoder passes packed examples; a tower passes images side by side, without boundaries, or under FP8
    packed, of one length, which makes them a batch again; context-parallel ranks pass their own positions and gather
    each other's keys and values.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, layer_number, attn_mask_type, attention_type, **kwargs)
        self.window = CAUSAL if "causal" in attn_mask_type.name else FULL

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [T, heads, head_dim] with the boundaries of `packed_seq_params`, [T / C, 1, heads, head_dim] with
                those of context-parallel chunks, [s, b, heads, head_dim] without.
            key, value: likewise of groups, which divide heads.
            attention_mask: unused: boundaries say it all.

        Returns:
            [T, heads * head_dim], [T / C, 1, heads * head_dim] or [s, b, heads * head_dim]; zeros for the padding after
            examples of one length.
        """
        if packed_seq_params is None:
            return super().forward(query, key, value, None)
        if isinstance(packed_seq_params, ContextParallelParams):
            assert self.context_group is not None
            return attend_from_chunks(
                self._attend, query, key, value, chunks=packed_seq_params.chunks, group=self.context_group
            )
        if isinstance(packed_seq_params, EqualExamples) and self.window == FULL:
            return self._attend_batched(query, key, value, packed_seq_params)
        return self._attend(query, key, value, packed_seq_params)

    def _attend_batched(self, query: Tensor, key: Tensor, value: Tensor, equal: EqualExamples) -> Tensor:
        """[T, heads * head_dim]."""
        rows = equal.examples * equal.length
        query_batch, key_batch, value_batch = (
            x[:rows].unflatten(0, (equal.examples, equal.length)).transpose(1, 2) for x in (query, key, value)
        )
        context = torch.nn.functional.scaled_dot_product_attention(
            query_batch,
            key_batch,
            value_batch,
            scale=self.softmax_scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        context = context.transpose(1, 2).reshape(rows, -1)
        return torch.nn.functional.pad(context, (0, 0, 0, len(query) - rows)) if rows < len(query) else context

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, boundaries: PackedSeqParams | ChunkBoundaries
    ) -> Tensor:
        """[T, heads * head_dim]."""
        context = varlen_attn(
            query,
            key,
            value,
            boundaries.cu_seqlens_q,
            boundaries.cu_seqlens_kv,
            boundaries.max_seqlen_q,
            boundaries.max_seqlen_kv,
            scale=self.softmax_scale,
            window_size=self.window,
        )
        assert isinstance(context, Tensor)
        return context.flatten(1)


def attend_from_chunks(
    attend: Callable[[Tensor, Tensor, Tensor, ChunkBoundaries], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    chunks: tuple[ChunkBoundaries, ...],
    group: ProcessGroup,
) -> Tensor:
    """Attend from a rank's own two chunks of queries to everyone's keys.

    A segment that began before a chunk has more keys than queries, so `attend` aligns its causal mask at the end.

    Args:
        attend: of queries [T / 2 C, heads, head_dim], the keys and values that their chunk needs, and its boundaries;
            returns [T / 2 C, heads * head_dim].
        query: [T / C, 1, heads, head_dim].
        key, value: [T / C, 1, groups, head_dim].
        chunks: of this rank, the earlier first.
        group: the context-parallel ranks.

    Returns:
        [T / C, 1, heads * head_dim].
    """
    gathered = gather_positions(torch.stack((key.squeeze(1), value.squeeze(1)), dim=1), group)
    context = []
    for queries, chunk in zip(query.squeeze(1).chunk(2), chunks, strict=True):
        keys, values = gathered[chunk.key_start : chunk.key_stop].unbind(1)
        context.append(attend(queries, keys, values, chunk))
    return torch.cat(context).unsqueeze(1)
