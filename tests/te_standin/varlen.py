"""What torch's variable-length attention computes, on a CPU, for which torch has no kernel."""

import torch
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """As torch.nn.attention.varlen.varlen_attn, for windows that are full or causal.

    Unlike the kernel it also takes float32. Rows after the last sequence, which the kernel does not write, are NaN.
    """
    assert window_size in ((-1, -1), (-1, 0)), window_size
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32, "cumulative lengths must be int32"
    queries, keys = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert max(queries) <= max_q and max(keys) <= max_k, "a sequence is longer than is said"
    count, key_count = sum(queries), sum(keys)
    outputs = [
        _attend(*sequence, scale=scale, is_causal=window_size == (-1, 0))
        for sequence in zip(
            query[:count].split(queries), key[:key_count].split(keys), value[:key_count].split(keys), strict=True
        )
    ]
    return torch.cat([*outputs, torch.full_like(query[count:], float("nan"))])


def _attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, is_causal: bool) -> Tensor:
    """[sequence, heads, head_dim]; the causal mask is aligned at the sequences' ends."""
    allowed = None
    if is_causal:
        allowed = torch.ones(len(query), len(key), dtype=torch.bool).tril(len(key) - len(query))
    output = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (query, key, value)),
        attn_mask=allowed,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return output.transpose(0, 1)
