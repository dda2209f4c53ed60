"""DotProductAttention."""

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from transformer_engine._release import released
from transformer_engine.pytorch.attention.dot_product_attention.utils import _attention_backends, choose_backend
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

_PATH = "pytorch/attention/dot_product_attention/dot_product_attention.py"
__all__ = ["DotProductAttention", "_attention_backends"]

_MASKS = ("no_mask", "padding", "causal", "padding_causal", "causal_bottom_right", "padding_causal_bottom_right")


class DotProductAttention(TransformerEngineBaseModule):
    """softmax(q k^T) v within each sequence. Unlike the kernels it also takes float32."""

    @released(
        _PATH,
        "num_attention_heads",
        "kv_channels",
        "num_gqa_groups",
        "qkv_format",
        "attn_mask_type",
        "sequence_parallel",
        "tp_size",
        "get_rng_state_tracker",
        "tp_group",
        "layer_number",
        "attention_type",
        "softmax_scale",
    )
    def __init__(self, arguments: SimpleNamespace) -> None:
        self.start(arguments)
        self.use_group(arguments)
        assert arguments.attention_type == "self", "the stand-in has self-attention only"
        self.attn_mask_type, self.qkv_format = arguments.attn_mask_type, arguments.qkv_format
        self.head_dim = arguments.kv_channels
        groups = arguments.num_gqa_groups or arguments.num_attention_heads
        assert arguments.num_attention_heads % groups == 0, (
            "The number of attention heads must be divisible by the number of GQA groups!"
        )
        self.num_gqa_groups_per_partition = groups // self.tp_size
        self.softmax_scale = arguments.softmax_scale or 1 / math.sqrt(self.head_dim)

    @released(
        _PATH,
        "query_layer",
        "key_layer",
        "value_layer",
        "qkv_format",
        "cu_seqlens_q",
        "cu_seqlens_kv",
        "max_seqlen_q",
        "max_seqlen_kv",
        "attn_mask_type",
    )
    def forward(self, arguments: SimpleNamespace) -> Tensor:
        query, key, value = arguments.query_layer, arguments.key_layer, arguments.value_layer
        self.record(query)
        mask = arguments.attn_mask_type or self.attn_mask_type
        assert mask in _MASKS, f"Attention mask type {mask} is not supported!"
        assert query.dtype == key.dtype == value.dtype, "Queries, keys and values must have the same data type!"
        assert query.shape[-1] == key.shape[-1] == value.shape[-1] == self.head_dim, (
            f"heads of {query.shape[-1]}, expected {self.head_dim}"
        )
        assert key.shape[-2] == self.num_gqa_groups_per_partition, (
            f"Keys and values must have num_gqa_group = {self.num_gqa_groups_per_partition} heads!"
        )
        choose_backend()
        match arguments.qkv_format or self.qkv_format:
            case "thd":
                return self._packed(query, key, value, mask, arguments)
            case "sbhd":
                return self._batched(*(x.transpose(0, 1) for x in (query, key, value)), mask).transpose(0, 1)
            case "bshd":
                return self._batched(query, key, value, mask)
            case unknown:
                raise AssertionError(f"DotProductAttention does not support qkv_format {unknown}")

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, mask: str, arguments: SimpleNamespace) -> Tensor:
        """[tokens, heads, head_dim]; rows after the last sequence, which not every kernel writes, are NaN."""
        assert query.dim() == 3, "Queries, keys and values must be 3D tensors when qkv_format = thd!"
        assert "padding" in mask, "Attention mask type must be padding or padding_causal for qkv_format=thd!"
        bounds = (arguments.cu_seqlens_q, arguments.cu_seqlens_kv)
        assert all(bound is not None and bound.dtype == torch.int32 for bound in bounds), "cu_seqlens must be int32"
        assert bounds[0].shape == bounds[1].shape, "cu_seqlens_q and cu_seqlens_kv must have the same shape"
        lengths = [bound.diff().tolist() for bound in bounds]
        for sizes, tokens, longest in zip(
            lengths, (query, key), (arguments.max_seqlen_q, arguments.max_seqlen_kv), strict=True
        ):
            assert sum(sizes) <= len(tokens), "cu_seqlens end after the tokens"
            assert longest is None or max(sizes) <= longest, "max_seqlen is less than a sequence"
        count = sum(lengths[0])
        sequences = zip(
            query[:count].split(lengths[0]),
            key[: sum(lengths[1])].split(lengths[1]),
            value[: sum(lengths[1])].split(lengths[1]),
            strict=True,
        )
        outputs = [self._attend(*sequence, mask) for sequence in sequences if len(sequence[0])]
        return torch.cat([*outputs, torch.full_like(query[count:], float("nan"))]).flatten(1)

    def _batched(self, query: Tensor, key: Tensor, value: Tensor, mask: str) -> Tensor:
        """[batch, sequence, heads, head_dim]."""
        if "padding" in mask:
            raise NotImplementedError("the stand-in has padding masks for qkv_format thd only")
        return self._attend(query, key, value, mask).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: str) -> Tensor:
        queries, keys = query.shape[-3], key.shape[-3]
        allowed = None
        if "causal" in mask:
            ones = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
            allowed = ones.tril(keys - queries if "bottom_right" in mask else 0)
        output = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(-3, -2) for x in (query, key, value)),
            attn_mask=allowed,
            scale=self.softmax_scale,
            enable_gqa=key.shape[-2] != query.shape[-2],
        )
        return output.transpose(-3, -2)
