"""Attention that never crosses an example's boundary, for the local backend."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor


def segment_mask(segment_ids: Tensor) -> Tensor:
    """Which positions attend to which: causal within a segment and nothing else.

    Padding (segment 0) is a segment of its own, so that no row of the mask is empty.

    Args:
        segment_ids: [B, S] integers.

    Returns:
        [B, 1, S, S] bool, True where the query (third dimension) may see the key (fourth).
    """
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same.tril()


class LocalAttention(torch.nn.Module):
    """torch's scaled_dot_product_attention behind megatron-core's core-attention interface.

    Two uses: the decoder passes B packed sequences flattened to one of B * S positions with the mask of
    `segment_mask`; the vision tower passes images side by side and no mask.
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
            query: [s, b, heads, head_dim]; with a mask, s = B * S and b = 1.
            key, value: [s, b, groups, head_dim], groups dividing heads.
            attention_mask: [B, 1, S, S] bool, True where attention is allowed; None: everything sees everything.

        Returns:
            [s, b, heads * head_dim].
        """
        sequence, batch, heads, head_dim = query.shape
        if attention_mask is not None:
            rows = attention_mask.shape[0]
            query, key, value = (
                x.view(rows, sequence // rows, *x.shape[2:]).transpose(1, 2) for x in (query, key, value)
            )
        else:
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=self.softmax_scale, enable_gqa=key.shape[1] != heads
        )
        context = context.transpose(1, 2) if attention_mask is not None else context.permute(2, 0, 1, 3)
        return context.reshape(sequence, batch, heads * head_dim)
