"""Any dense model, and any experts that are not refused: the first loss stays."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mm1.config import MM1Config
from megatron_mm1.model.mm1 import MM1Model
from tests.canonical import load_canonical
from tests.upcycling import DENSE, dense_model, losses, upcycled


@st.composite
def models(draw) -> tuple[MM1Config, dict]:
    """(a dense model, experts for it); wherever they are not refused."""
    layers, slices, copies = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 4))
    width = draw(st.integers(1, 4)) * 4
    heads, groups = draw(st.sampled_from([(4, 2), (4, 4), (2, 1)]))
    decoder = dataclasses.replace(
        DENSE.model.decoder,
        num_layers=layers,
        ffn_hidden_size=slices * width,
        num_attention_heads=heads,
        num_query_groups=groups,
        add_qkv_bias=draw(st.booleans()),
        untie_embeddings_and_output_weights=draw(st.booleans()),
    )
    moe = dict(
        num_moe_experts=slices * copies,
        moe_ffn_hidden_size=draw(st.sampled_from([width, None])) if slices == 1 else width,
        moe_router_topk=slices * draw(st.integers(2 if slices == 1 else 1, copies)),
        moe_layer_freq=draw(st.integers(1, layers)),
        moe_router_score_function=draw(st.sampled_from(["softmax", "sigmoid"])),
        moe_token_dispatcher_type=draw(st.sampled_from(["alltoall", "allgather"])),
    )
    model = dataclasses.replace(DENSE.model, decoder=decoder)
    return dataclasses.replace(DENSE, model=model), moe


def check_property(groups, case: tuple[MM1Config, dict], seed: int) -> None:
    config, moe = case
    dense, state = dense_model(config, groups)
    config, tensors = upcycled(state, moe, config=config, seed=seed)
    model = MM1Model(config, backend="local", pg_collection=groups)
    load_canonical(model, tensors, groups)
    torch.testing.assert_close(losses(model), losses(dense), atol=1e-5, rtol=0)


def property_test(*, max_examples: int):
    def decorate(test):
        suppressed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        test = settings(max_examples=max_examples, deadline=None, derandomize=True, suppress_health_check=suppressed)(
            test
        )
        return given(case=models(), seed=st.integers(-(2**63), 2**63))(test)

    return decorate


@property_test(max_examples=20)
def test_any_dense_model_keeps_its_loss(groups, case, seed):
    check_property(groups, case, seed)


@pytest.mark.slow
@property_test(max_examples=100)
def test_any_dense_model_keeps_its_loss_at_length(groups, case, seed):
    check_property(groups, case, seed)
