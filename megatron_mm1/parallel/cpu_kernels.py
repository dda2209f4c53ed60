"""What megatron-core takes from apex and Transformer Engine on a GPU, for the CPU: fewer passes over memory than the
plain operations they replace, the same numbers to rounding. `cpu.install` puts them where megatron-core looks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_weight_gradient(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad += grad_output^T @ total_input: apex's `wgrad_gemm_accum_fp32`.

    Args:
        total_input: [positions, in].
        grad_output: [positions, out].
        main_grad: [out, in], float32.
    """
    main_grad.addmm_(grad_output.t().to(main_grad.dtype), total_input.to(main_grad.dtype))


def rotate(x: Tensor, freqs: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotary position embedding: Transformer Engine's `fused_apply_rotary_pos_emb`.

    Args:
        x: [s, b, heads, head_dim].
        freqs: [s, 1, 1, head_dim], radians; the second half repeats the first.
        interleaved: must be False: element i turns with element i + head_dim / 2.
    """
    assert not interleaved and freqs.shape[-1] == x.shape[-1]
    if torch.is_grad_enabled():
        return _Rotation.apply(x, freqs)
    return _turn(x, *_cos_and_sin(x, freqs))


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, freqs: Tensor) -> Tensor:
        cos, sin = _cos_and_sin(x, freqs)
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, -sin), None


def _cos_and_sin(x: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
    half = freqs[..., : freqs.shape[-1] // 2]
    return half.cos().to(x.dtype), half.sin().to(x.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x1 cos - x2 sin, x2 cos + x1 sin) of the halves x1 and x2 of the last dimension."""
    turned = torch.empty_like(x)
    x1, x2 = x.chunk(2, dim=-1)
    turned1, turned2 = turned.chunk(2, dim=-1)
    torch.mul(x1, cos, out=turned1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=turned2).addcmul_(x1, sin)
    return turned
