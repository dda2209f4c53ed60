"""What replaces plain operations on the CPU computes what they do, forwards and backwards."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch.nn.functional import rms_norm, silu

from megatron_mm1.model.activations import SwiGLU
from megatron_mm1.model.norms import LocalNorm
from megatron_mm1.parallel.cpu_kernels import add_weight_gradient, rotate

FREQS = torch.linspace(0, 9, 7 * 4).view(7, 1, 1, 4).repeat(1, 1, 1, 2)
NORM = LocalNorm(SimpleNamespace(normalization="RMSNorm", params_dtype=torch.float32, sequence_parallel=False), 8)


def plain_swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return silu(gate) * up


PAIRS = {
    "SwiGLU": (SwiGLU(None), plain_swiglu),
    "RMSNorm": (NORM, lambda x: rms_norm(x, (8,), NORM.weight, NORM.eps)),
    "rotation": (lambda x: rotate(x, FREQS), lambda x: _apply_rotary_pos_emb_bshd(x, FREQS)),
}


def outputs_and_gradients(function, x, gradient):
    """(output, gradient of the input, gradient of the norm's weight if it is in use)."""
    x = x.detach().requires_grad_()
    NORM.weight.grad = None
    output = function(x)
    output.backward(gradient)
    return output.detach(), x.grad, NORM.weight.grad


@pytest.fixture(autouse=True)
def weight_of_the_norm():
    with torch.no_grad():
        NORM.weight.copy_(torch.linspace(0.5, 1.5, 8))


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "a slice"])
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_plain_operation(name, contiguous):
    ours, plain = PAIRS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 2, 3, 24, generator=generator)[..., 8:16]
    gradient = torch.randn(*plain(x).shape, generator=generator)
    if contiguous:
        x = x.contiguous()
    expected = outputs_and_gradients(plain, x, gradient)
    torch.testing.assert_close(outputs_and_gradients(ours, x, gradient), expected, atol=1e-6, rtol=1e-5)
    assert (expected[2] is not None) == (name == "RMSNorm")


@pytest.mark.parametrize("name", PAIRS)
def test_takes_no_positions(name):
    """An expert without tokens, a rank without images."""
    ours, plain = PAIRS[name]
    x = torch.empty(0, 2, 3, 8)
    if name == "rotation":
        ours, plain = lambda x: rotate(x, FREQS[:0]), lambda x: _apply_rotary_pos_emb_bshd(x, FREQS[:0])
    gradient = torch.empty_like(plain(x))
    torch.testing.assert_close(outputs_and_gradients(ours, x, gradient), outputs_and_gradients(plain, x, gradient))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_rms_norm_of_small_and_large_inputs(scale):
    x = scale * torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(NORM(x), rms_norm(x, (8,), NORM.weight, NORM.eps), atol=0, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weights_gradient_is_added_to_its_buffer(dtype):
    generator = torch.Generator().manual_seed(2)
    total_input, grad_output = (torch.randn(6, size, generator=generator).to(dtype) for size in (3, 5))
    main_grad = torch.full((5, 3), 2.0)
    add_weight_gradient(total_input, grad_output, main_grad)
    torch.testing.assert_close(main_grad, 2.0 + grad_output.float().T @ total_input.float())
