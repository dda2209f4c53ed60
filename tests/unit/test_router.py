"""The experts' router against plain loops: padding, capacity, the tally."""

import math

import pytest
import torch

from megatron_mm1.config.loading import load_config
from megatron_mm1.model.decoder import decoder_transformer_config
from megatron_mm1.model.router import IMAGE, PADDING, TEXT, Router

EXPERTS, TOP_K, TOKENS = 4, 2, 40
KINDS = torch.tensor([TEXT] * 8 + [IMAGE] * 20 + [PADDING] * 12)


def make_router(groups, **settings) -> Router:
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    config = load_config(["--preset", "mm1-tiny-moe", *options])
    router = Router(decoder_transformer_config(config, backend="local"), pg_collection=groups)
    router.set_layer_number(4)
    return router


def logits() -> torch.Tensor:
    return torch.randn(TOKENS, 1, EXPERTS, generator=torch.Generator().manual_seed(3))


def route(router: Router) -> tuple[torch.Tensor, torch.Tensor]:
    router.kinds = KINDS
    return router.routing(logits().requires_grad_(), (KINDS == PADDING)[:, None])


def test_padding_goes_nowhere_and_the_rest_to_its_best_experts(groups):
    weights, goes = route(make_router(groups))
    best = logits().squeeze(1).topk(TOP_K)
    for token in range(TOKENS):
        expected = set() if KINDS[token] == PADDING else set(best.indices[token].tolist())
        assert set(goes[token].nonzero().flatten().tolist()) == expected
        if expected:
            torch.testing.assert_close(
                weights[token, best.indices[token]], best.values[token].softmax(dim=0), rtol=1e-6, atol=0
            )
    assert not weights[KINDS == PADDING].any()


def test_pre_softmax_weighs_experts_by_their_share_of_all(groups):
    weights, goes = route(make_router(groups, moe_router_pre_softmax="true"))
    assert torch.equal(goes, route(make_router(groups))[1])  # the same experts
    shares = logits().squeeze(1).softmax(dim=-1)
    torch.testing.assert_close(weights, shares * goes, rtol=1e-6, atol=0)


def test_pre_softmax_leaves_the_balance_loss_as_it_is(groups):
    """It is computed of the softmax over all experts either way: without a loss of the weights, gradients are equal."""

    def gradient(**settings) -> torch.Tensor:
        router, x = make_router(groups, **settings), logits().requires_grad_()
        weights, _ = router.routing(x, (KINDS == PADDING)[:, None])
        (0 * weights).sum().backward()
        assert x.grad.abs().sum() > 0
        return x.grad

    torch.testing.assert_close(gradient(moe_router_pre_softmax="true"), gradient(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [0.3, 0.6, 1.0, 1.5])
def test_an_expert_takes_the_most_probable_tokens_up_to_its_capacity(groups, factor):
    weights, goes = route(make_router(groups))
    kept_weights, kept = route(make_router(groups, moe_expert_capacity_factor=factor))
    capacity = math.ceil(factor * int(goes.sum()) / EXPERTS)
    for expert in range(EXPERTS):
        tokens = goes[:, expert].nonzero().flatten().tolist()
        first = sorted(tokens, key=lambda token: -weights[token, expert].item())[:capacity]
        assert set(kept[:, expert].nonzero().flatten().tolist()) == set(first)
    torch.testing.assert_close(kept_weights, weights * kept)
    assert (factor >= 1.5) == torch.equal(kept, goes)


def test_nothing_is_dropped_outside_training(groups):
    router = make_router(groups, moe_expert_capacity_factor=0.3).eval()
    assert int(route(router)[1].sum()) == TOP_K * int((KINDS != PADDING).sum())


def test_the_tally_counts_by_modality(groups):
    router = make_router(groups, moe_expert_capacity_factor=0.6)
    _, kept = route(router)
    _, goes = route(make_router(groups))
    scores = logits().squeeze(1).double().softmax(dim=-1)
    for modality in (TEXT, IMAGE):
        of_modality = modality == KINDS
        entropy = sum(torch.distributions.Categorical(probs=row).entropy() for row in scores[of_modality])
        expected = [
            *goes[of_modality].sum(dim=0).tolist(),
            int((goes & ~kept)[of_modality].sum()),
            float(entropy),
            int(of_modality.sum()),
        ]
        assert router.tally[modality].tolist() == pytest.approx(expected)
    route(router)
    assert router.tally[:, -1].tolist() == [2 * 8, 2 * 20]


@pytest.mark.parametrize("padded", [False, True])
def test_a_microbatch_of_padding_alone_has_no_loss_and_no_gradient(groups, padded):
    router = make_router(groups)
    x = logits().requires_grad_()
    mask = torch.full((TOKENS, 1), True) if padded else None
    weights, _ = router.routing(x, mask)
    weights.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert bool(x.grad.abs().sum() > 0) == (not padded)


def test_the_expert_bias_steers_the_choice_but_not_the_weights(groups):
    router = make_router(groups, moe_router_score_function="sigmoid", moe_router_enable_expert_bias="true")
    before, chosen = route(router)
    router.expert_bias += torch.tensor([0.0, 0.0, 0.0, 10.0])
    weights, biased = route(router)
    assert biased[KINDS != PADDING, 3].all() and not chosen[KINDS != PADDING, 3].all()
    same = (biased == chosen).all(dim=1)
    assert same.any()
    torch.testing.assert_close(weights[same], before[same])
    assert router.local_tokens_per_expert.tolist() == (chosen.sum(dim=0) + biased.sum(dim=0)).tolist()
