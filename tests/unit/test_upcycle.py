"""Dense -> experts: the new model computes what the old one did, its experts are copies, its routers are not."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_mm1.checkpoint.tensors import StateDict
from megatron_mm1.checkpoint.upcycle import upcycle
from megatron_mm1.config import MoEConfig
from megatron_mm1.errors import ConfigError, UserError
from megatron_mm1.model.mm1 import MM1Model
from tests.canonical import canonical_state, load_canonical
from tests.upcycling import CASES, DENSE, SMALL, dense_model, losses, upcycled

LAYERS = "language_model.decoder.layers."


@pytest.fixture(scope="module")
def dense(groups):
    return dense_model(DENSE, groups)


@pytest.fixture(scope="module")
def state(dense) -> dict[str, Tensor]:
    return dense[1]


@pytest.fixture(scope="module")
def dense_losses(dense) -> Tensor:
    return losses(dense[0])


@pytest.mark.parametrize("case", CASES)
def test_the_first_loss_is_the_dense_models(groups, state, dense_losses, case):
    config, tensors = upcycled(state, CASES[case])
    model = MM1Model(config, backend="local", pg_collection=groups)
    assert set(tensors) == set(canonical_state(model, groups))
    load_canonical(model, tensors, groups)
    found = losses(model)
    torch.testing.assert_close(found, dense_losses, atol=5e-6, rtol=0)  # each position's
    assert found.mean().item() == pytest.approx(dense_losses.mean().item(), abs=1e-6)


def test_experts_are_equal_and_routers_are_not(state):
    _, tensors = upcycled(state, dict(moe_layer_freq=1))
    for layer in (1, 3):
        for part in ("linear_fc1", "linear_fc2"):
            experts = tensors[f"{LAYERS}{layer}.mlp.experts.experts.{part}.weight"]
            assert all(torch.equal(expert, state[f"{LAYERS}{layer}.mlp.{part}.weight"]) for expert in experts)
    routers = torch.cat([tensors[f"{LAYERS}{layer}.mlp.router.weight"] for layer in (1, 3)])
    assert len({tuple(row.tolist()) for row in routers}) == 8
    assert routers.std().item() == pytest.approx(DENSE.model.decoder.init_method_std, rel=0.2)


def test_all_else_goes_over_as_it_is_and_nothing_but_weights(state):
    _, tensors = upcycled({**state, "optimizer.state.exp_avg.tower.class_token": torch.ones(16)}, {})
    same = {name for name in tensors if name in state and torch.equal(tensors[name], state[name])}
    assert set(state) - same == {f"{LAYERS}3.mlp.{part}" for part in FEED_FORWARD}
    assert set(tensors) - same == {f"{LAYERS}3.{part}" for part in EXPERTS}


FEED_FORWARD = ("linear_fc1.layer_norm_weight", "linear_fc1.weight", "linear_fc2.weight")
EXPERTS = (
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    "mlp.experts.experts.linear_fc1.weight",
    "mlp.experts.experts.linear_fc2.weight",
)


def test_a_router_depends_on_its_block_and_the_seed_alone(state):
    name = f"{LAYERS}3.mlp.router.weight"
    _, tensors = upcycled(state, dict(moe_layer_freq=2))
    _, more = upcycled(dict(reversed(state.items())), dict(moe_layer_freq=1))
    _, other = upcycled(state, dict(moe_layer_freq=2), seed=8)
    assert torch.equal(tensors[name], more[name])
    assert not torch.equal(tensors[name], other[name])


def test_dtypes_stay(state):
    _, tensors = upcycled({name: tensor.bfloat16() for name, tensor in state.items()}, CASES["halves"])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_an_expert_is_read_at_a_time(state):
    _, plan = upcycle(DENSE.model, MoEConfig(**SMALL), StateDict(state), seed=0)
    [fc1] = [planned for planned in plan if planned.name.endswith("experts.linear_fc1.weight")]
    assert [tuple(piece.read().shape) for piece in fc1.pieces] == [(1, 96, 32)] * 4


REFUSED = {
    "top 1": (dict(moe_router_topk=1), ["moe_router_topk 1 weighs", "moe_router_topk 1 without"]),
    "weights below 1": (dict(moe_router_pre_softmax=True), ["moe_router_pre_softmax weighs"]),
    "width": (dict(moe_ffn_hidden_size=20), ["20 does not divide the dense model's ffn_hidden_size 48"]),
    "wider": (dict(moe_ffn_hidden_size=96), ["96 does not divide"]),
    "slices": (
        dict(moe_ffn_hidden_size=16, num_moe_experts=4, moe_router_topk=2),
        ["num_moe_experts 4 is no multiple", "moe_router_topk 2 is no multiple"],
    ),
    "too few experts": (dict(num_moe_experts=1), ["moe_router_topk 2 is more than num_moe_experts 1"]),
    "no block": (dict(moe_layer_freq=3), ["leaves none of the 2 blocks experts"]),
    "several": (
        dict(moe_router_topk=1, moe_layer_freq=0, moe_ffn_hidden_size=0),
        ["moe_router_topk 1 weighs", "moe_layer_freq 0 is too small", "moe_ffn_hidden_size 0 is too small"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_compute_the_same_is_refused(state, case):
    moe, reasons = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        upcycled(state, moe)
    assert len(error.value.problems) == len(reasons)
    for reason in reasons:
        assert reason in str(error.value)


def test_a_model_with_experts_is_refused(state):
    config, tensors = upcycled(state, {})
    with pytest.raises(ConfigError, match="has 4 experts already"):
        upcycled(tensors, {}, config=config)


def test_tensors_that_are_not_there_or_misshapen_are_all_named(state):
    wrong = {**state, f"{LAYERS}3.mlp.linear_fc2.weight": torch.zeros(32, 47)}
    del wrong[f"{LAYERS}1.mlp.linear_fc1.layer_norm_weight"]
    with pytest.raises(UserError) as error:
        upcycled(wrong, dict(moe_layer_freq=1))
    assert "1.mlp.linear_fc1.layer_norm_weight is missing" in str(error.value)
    assert "3.mlp.linear_fc2.weight has shape (32, 47), the configuration makes it (32, 48)" in str(error.value)


def test_every_setting_of_experts_is_known_to_keep_the_first_loss_or_be_refused():
    """A new one, say weights that do not add up to 1, needs a look at `upcycle` and a case above."""
    assert {field.name for field in dataclasses.fields(MoEConfig)} == {
        "num_moe_experts",
        "moe_layer_freq",
        "moe_ffn_hidden_size",
        "moe_router_topk",
        "moe_router_score_function",
        "moe_router_pre_softmax",
        "moe_aux_loss_coeff",
        "moe_z_loss_coeff",
        "moe_token_dispatcher_type",
        "moe_expert_capacity_factor",
        "moe_router_enable_expert_bias",
        "moe_router_bias_update_rate",
    }
