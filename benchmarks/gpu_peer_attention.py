"""Causal attention within packed examples, in the ways that plain torch offers; the fastest one is taken."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import torch
from gpu_timing import milliseconds
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values [T, heads, dim] -> [T, heads, dim]."""


def varlen(lengths: Sequence[int], device: torch.device) -> Attention:
    """Flash attention on cumulative lengths."""
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).int()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = varlen_attn(query, key, value, ends, ends, max(lengths), max(lengths), window_size=(-1, 0))
        assert isinstance(output, Tensor)
        return output

    return attend


def flex(lengths: Sequence[int], device: torch.device) -> Attention:
    """FlexAttention with a block mask; only compiled does it skip what is masked."""
    total = sum(lengths)
    example = torch.arange(len(lengths), device=device).repeat_interleave(
        torch.tensor(lengths, device=device), output_size=total
    )

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (example[query] == example[key])

    mask = create_block_mask(visible, None, None, total, total, device=str(device))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
        output = flex_attention(*heads_first, block_mask=mask)
        assert isinstance(output, Tensor)
        return output[0].transpose(0, 1)

    return attend


def per_example(lengths: Sequence[int], device: torch.device) -> Attention:
    """scaled_dot_product_attention with its causal kernel, one example after the other."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        examples = zip(*(x.transpose(0, 1)[None].split(list(lengths), dim=2) for x in (query, key, value)), strict=True)
        outputs = [scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in examples]
        return torch.cat(outputs, dim=2)[0].transpose(0, 1)

    return attend


WAYS: Mapping[str, Callable[[Sequence[int], torch.device], Attention]] = {
    "varlen": varlen,
    "flex": flex,
    "per_example": per_example,
}


def fastest(
    lengths: Sequence[int], *, heads: int, head_dim: int, device: torch.device
) -> tuple[str, dict[str, float | str]]:
    """The name of the fastest way, compiled, and what each took: milliseconds forward and backward, or its error.

    Raises:
        RuntimeError: none works.
    """
    shape = (3, sum(lengths), heads, head_dim)
    inputs = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    tried: dict[str, float | str] = {}
    for name, make in WAYS.items():
        try:
            attend = torch.compile(make(lengths, device), dynamic=False)
            tried[name] = median(milliseconds(partial(_both_ways, attend, inputs), warm_up=3, repeats=10))
        except Exception as error:  # a kernel that this torch or card lacks
            tried[name] = f"{type(error).__name__}: {error}"[:300]
    times = {name: result for name, result in tried.items() if isinstance(result, float)}
    if not times:
        raise RuntimeError(f"no way of attention works here: {tried}")
    return min(times, key=lambda name: times[name]), tried


def _both_ways(attend: Attention, inputs: Tensor) -> None:
    inputs.grad = None
    attend(*inputs.unbind()).sum().backward()
