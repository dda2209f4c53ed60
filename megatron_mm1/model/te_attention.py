"""Transformer Engine's packed attention under context parallelism.

Transformer Engine can split packed sequences over ranks itself, but only where the length of every example is a
multiple of 2 C, which would change what is packed with the layout. Instead each rank gathers keys and values and runs
the packed kernel on each of its two chunks of queries. Imported only where Transformer Engine is.
"""

import copy
from typing import Any

from megatron.core.extensions import transformer_engine as te
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_mm1.model.packed_attention import ContextParallelParams, attend_from_chunks
from megatron_mm1.parallel.context import ChunkBoundaries


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
        """Shapes as `attend_from_chunks`; `attention_mask` is unused: `packed_seq_params` says it all."""
        return attend_from_chunks(
            self._attend, query, key, value, chunks=packed_seq_params.chunks, group=self.context_group
        )

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, chunk: ChunkBoundaries) -> Tensor:
        # megatron-core's forward would take the boundaries from a PackedSeqParams, and the mask from the layer.
        context: Tensor = super(te.TEDotProductAttention, self).forward(
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            None,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            cu_seqlens_q=chunk.cu_seqlens_q,
            cu_seqlens_kv=chunk.cu_seqlens_kv,
            max_seqlen_q=chunk.max_seqlen_q,
            max_seqlen_kv=chunk.max_seqlen_kv,
        )
        return context
