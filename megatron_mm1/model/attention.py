"""Attention that never crosses an example's boundary, for the local backend."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mm1.parallel.context import gather_positions, local_positions


def segment_mask(segment_ids: Tensor, context_group: ProcessGroup | None = None) -> Tensor:
    """Which positions attend to which: causal within a segment and nothing else.

    Padding (segment 0) is a segment of its own, so that no row of the mask is empty.

    Args:
        segment_ids: [B, S] integers.
        context_group: the context-parallel ranks, where there are several.

    Returns:
        [B, 1, S, S] bool, True where the query (third dimension) may see the key (fourth); for a rank of C
        context-parallel ones, [1, 1, T / C, T] of its own queries and every key of the flattened microbatch.
    """
    if context_group is None or context_group.size() == 1:
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        return same.tril()
    rows, length = segment_ids.shape
    row = torch.arange(rows, device=segment_ids.device)[:, None]
    segments = (row * (length + 1) + segment_ids).flatten()  # the same number in two rows is not the same example
    positions = torch.arange(rows * length, device=segment_ids.device)
    ours = local_positions(segments, context_group), local_positions(positions, context_group)
    mask = (ours[0][:, None] == segments[None]) & (ours[1][:, None] >= positions[None])
    return mask[None, None]


class LocalAttention(torch.nn.Module):
    """torch's scaled_dot_product_attention behind megatron-core's core-attention interface.

    Two uses: the decoder passes B packed sequences flattened to one of B * S positions with the mask of
    `segment_mask`; the vision tower passes images side by side and no mask. Under context parallelism the decoder's
    ranks gather each other's keys and values.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.context_group = pg_collection.cp if pg_collection is not None else None

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
            query: [s, b, heads, head_dim]; with a mask, s = B * S (this rank's part of it) and b = 1.
            key, value: [s, b, groups, head_dim], groups dividing heads.
            attention_mask: of `segment_mask`, True where attention is allowed; None: everything sees everything.

        Returns:
            [s, b, heads * head_dim].
        """
        sequence, batch, heads, head_dim = query.shape
        if attention_mask is not None:
            rows = attention_mask.shape[0]
            if self.context_group is not None and self.context_group.size() > 1:
                key, value = gather_positions(torch.stack((key, value), dim=1), self.context_group).unbind(dim=1)
            query, key, value = (
                x.view(rows, len(x) // rows, *x.shape[2:]).transpose(1, 2) for x in (query, key, value)
            )
        else:
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=self.softmax_scale, enable_gqa=key.shape[1] != heads
        )
        context = context.transpose(1, 2) if attention_mask is not None else context.permute(2, 0, 1, 3)
        return context.reshape(sequence, batch, heads * head_dim)
