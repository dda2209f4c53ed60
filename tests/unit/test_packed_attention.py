"""Packed examples of one length, which torch attends to in one batch, are the same images side by side."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_mm1.model.attention import LocalAttention
from megatron_mm1.model.packed_attention import PackedAttention
from megatron_mm1.model.vision import _boundaries

HEADS, HEAD_DIM = 4, 8


def attention(cls: type[LocalAttention]) -> LocalAttention:
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS)
    return cls(config, 1, AttnMaskType.no_mask, "self", softmax_scale=0.3)


def gradients(output: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), leaves)


@pytest.mark.parametrize("padding", [0, 3, 40])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("groups", [HEADS, 2])
def test_equal_images_are_a_batch(images, padding, groups):
    """On the host alone it is known that they are; torch has no kernel of variable length on a CPU."""
    tokens = 11
    rows = images * tokens
    torch.manual_seed(0)
    packed = [torch.randn(rows + padding, count, HEAD_DIM, requires_grad=True) for count in (HEADS, groups, groups)]
    boundaries = _boundaries(images, tokens, rows + padding, device=torch.device("cpu"))
    output = attention(PackedAttention)(*packed, None, packed_seq_params=boundaries)

    side_by_side = [x[:rows].unflatten(0, (images, tokens)).transpose(0, 1) for x in packed]
    expected = attention(LocalAttention)(*side_by_side, None).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(output[:rows], expected)
    assert not output[rows:].any() and output.shape == (rows + padding, HEADS * HEAD_DIM)
    for got, wanted in zip(gradients(output[:rows], packed), gradients(expected, packed), strict=True):
        torch.testing.assert_close(got, wanted)
        assert not got[rows:].any()
