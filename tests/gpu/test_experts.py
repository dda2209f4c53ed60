"""Experts of one grouped product beside one product after the other, and tokens moved to them by a fused kernel."""

import pytest
import torch
from torch import Tensor

from megatron_mm1.config.schema import MoEConfig
from megatron_mm1.model.decoder import decoder_transformer_config
from megatron_mm1.model.router import IMAGE, PADDING, TEXT
from megatron_mm1.model.specs import decoder_stack_spec
from megatron_mm1.parallel.device import device
from tests.canonical import canonical_state, load_canonical
from tests.gpu.comparison import BF16_ROUNDING, relative_error
from tests.gpu.marks import TRANSFORMER_ENGINE
from tests.gpu.models import in_float64, small_config, with_precision

pytestmark = TRANSFORMER_ENGINE

POSITIONS = 300


def moe_config(**moe):
    return small_config(moe=MoEConfig(num_moe_experts=8, moe_layer_freq=1, moe_ffn_hidden_size=256, **moe))


def experts_layer(config, groups, *, backend: str, **settings):
    """A layer of experts by itself; `settings` override megatron-core's configuration."""
    transformer_config = decoder_transformer_config(config, backend=backend)
    for name, value in settings.items():
        setattr(transformer_config, name, value)
    build = decoder_stack_spec(backend, qk_layernorm=False).submodules.moe_layer.submodules.mlp
    layer = build(config=transformer_config, pg_collection=groups, is_mtp_layer=False)
    layer.set_layer_number(2)
    return layer.to(device()).train()


def layer_weights(config, groups) -> dict[str, Tensor]:
    """Random weights on the host, numbers that bf16 has; the router's large, so that rounding changes no choice."""
    layer = experts_layer(with_precision(config, "fp32"), groups, backend="local")
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5).bfloat16().float()
        for name, weight in canonical_state(layer, groups).items()
    }


def layer_inputs(config) -> tuple[Tensor, Tensor]:
    """[s, 1, H] hidden states that bf16 has, and [1, s] kinds: some text, some image, 20 positions of padding."""
    hidden = torch.randn(POSITIONS, 1, config.model.decoder.hidden_size, generator=torch.Generator().manual_seed(1))
    kinds = torch.full((1, POSITIONS), TEXT, dtype=torch.int8)
    kinds[:, 40:100], kinds[:, -20:] = IMAGE, PADDING
    return hidden.bfloat16(), kinds


def results(layer, inputs) -> dict[str, Tensor]:
    """The layer's output, and the gradients of its input and router."""
    dtype = next(layer.parameters()).dtype
    hidden = inputs[0].to(device(), dtype).requires_grad_()
    output, _ = layer(hidden, padding_mask=inputs[1].to(device()))
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * cotangent.to(output)).sum().backward()
    return {"output": output.detach(), "input": hidden.grad, "router": layer.router.weight.grad}


def loaded(config, groups, weights, *, backend: str, **settings):
    layer = experts_layer(config, groups, backend=backend, **settings)
    load_canonical(layer, weights, groups)
    return layer


@pytest.mark.parametrize("capacity", [None, 1.0], ids=["all tokens", "capacity 1"])
@pytest.mark.parametrize("permute_fusion", [True, False])
def test_grouped_experts_are_the_sequential_ones(groups, capacity, permute_fusion):
    """Both in bf16, by their errors from the sequential ones in float64; their routers choose from the same numbers."""
    config = moe_config(moe_expert_capacity_factor=capacity)
    weights, inputs = layer_weights(config, groups), layer_inputs(config)
    exact = in_float64(loaded(with_precision(config, "fp32"), groups, weights, backend="local"))
    expected = results(exact, inputs)
    sequential = results(loaded(config, groups, weights, backend="local"), inputs)
    grouped = results(
        loaded(config, groups, weights, backend="transformer_engine", moe_permute_fusion=permute_fusion), inputs
    )
    for name, value in expected.items():
        limit = max(3 * relative_error(sequential[name], value), 2 * BF16_ROUNDING)
        assert relative_error(grouped[name], value) < limit, name


def test_no_choice_hangs_on_rounding(groups):
    """What the comparison above rests on: bf16 and float64 send the same tokens to the same experts."""
    config = moe_config()
    weights, inputs = layer_weights(config, groups), layer_inputs(config)
    chosen = []
    for precision in ("bf16", "fp32"):
        layer = loaded(with_precision(config, precision), groups, weights, backend="local")
        dtype = next(layer.parameters()).dtype
        _, routing = layer.router(inputs[0].to(device(), dtype), inputs[1].T.to(device()) == PADDING)
        chosen.append(routing.cpu())
    assert torch.equal(*chosen)
    assert not chosen[0][-20:].any() and (chosen[0][:-20].sum(dim=1) == 2).all()
