"""Transformer Engine's packed attention under context parallelism.

Transformer Engine can split packed sequences over ranks itself, but only where the length of every example is a
multiple of 2 C, which would change what is packed with the layout. Instead each rank gathers keys and values and runs
the packed kernel on each of its two chunks of queries; a segment that began before the chunk has more keys than
queries, and the causal mask is aligned at its end. Imported only where Transformer Engine is.
"""

import copy
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_mm1.model.packed_attention import ContextParallelParams
from megatron_mm1.parallel.context import gather_positions


class ContextParallelAttention(te.TEDotProductAttention):
    """TEDotProductAttention on a rank's own queries and everyone's keys; arguments as there."""

    def __init__(
        self, config: TransformerConfig, *args: Any, pg_collection: ProcessGroupCollection, **kwargs: Any
    ) -> None:
        whole = copy.copy(config)
        whole.context_parallel_size = 1  # the kernel shall not split anything itself
        super().__init__(whole, *args, pg_collection=pg_collection, **kwargs)
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: ContextParallelParams,
        **kwargs: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: [T / C, 1, heads, head_dim].
            key, value: [T / C, 1, groups, head_dim].
            attention_mask: unused; `packed_seq_params` says it all.

        Returns:
            [T / C, 1, heads * head_dim].
        """
        queries = query.squeeze(1).chunk(2)
        keys, values = gather_positions(torch.stack((key.squeeze(1), value.squeeze(1)), 1), self.context_group).unbind(
            1
        )
        context = [
            super(te.TEDotProductAttention, self).forward(
                chunk_queries.contiguous(),
                keys[chunk.key_start : chunk.key_stop].contiguous(),
                values[chunk.key_start : chunk.key_stop].contiguous(),
                None,
                qkv_format="thd",
                attn_mask_type="padding_causal_bottom_right",
                cu_seqlens_q=chunk.cu_seqlens_q,
                cu_seqlens_kv=chunk.cu_seqlens_kv,
                max_seqlen_q=chunk.max_seqlen_q,
                max_seqlen_kv=chunk.max_seqlen_kv,
            )
            for chunk_queries, chunk in zip(queries, packed_seq_params.chunks, strict=True)
        ]
        return torch.cat(context).flatten(1).unsqueeze(1)
