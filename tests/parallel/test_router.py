"""The experts' router in parallel: its losses against plain torch, and dropping against what each rank would drop."""

import dataclasses
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_mm1.config import MM1Config
from megatron_mm1.model.router import Router
from megatron_mm1.parallel.context import local_chunks
from megatron_mm1.parity import jobs
from megatron_mm1.parity.harness import Comparison
from megatron_mm1.parity.layouts import choose_layouts
from megatron_mm1.parity.shards import complete_gradients, relative_errors, shards, squared_errors
from megatron_mm1.training import step
from tests.parallel.test_parity import CONFIGS

CONFIG = CONFIGS["mm1-tiny-moe"]
# 64 of 80 positions that are not padding are image slots; one block has experts, the last, so that its router's losses
# reach no other router.
IMAGES = dataclasses.replace(
    CONFIG,
    data=dataclasses.replace(CONFIG.data, seq_length=81),
    training=dataclasses.replace(CONFIG.training, micro_batch_size=4),
    model=dataclasses.replace(CONFIG.model, moe=dataclasses.replace(CONFIG.model.moe, moe_layer_freq=4)),
)
LAYOUTS = (
    "EP2 DP2",
    "DP2 distributed optimizer",
    "PP2",
    "PP2 VPP2",
    "CP2 EP2",
    "TP2+SP",
    "TP2+SP EP2",
    "TP2+SP CP2 EP2",
    "PP2 CP2 EP2",
    "TP2+SP ETP2 DP2",
)


def losses_of_the_router_alone(right):
    def loss(*arguments, **options):
        total, count, statistics = right(*arguments, **options)
        return 0.0 * total, count, statistics

    return loss


def plain_torch(config: MM1Config, checkpoint, *, kind: str) -> dict[str, torch.Tensor]:
    """In one process: the gradient of the two losses with respect to the router's weight, from its inputs alone."""
    trial = jobs.Trial(config, backend="local")
    trial.load(checkpoint)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    [router] = [module for chunk in trial.model for module in chunk.modules() if isinstance(module, Router)]
    router.register_forward_pre_hook(lambda _, arguments: seen.append((arguments[0].detach(), arguments[1])))
    trial.backward(jobs.synthetic_share(config, kind, trial.groups))

    moe = config.model.moe
    weight = router.weight.detach().clone().requires_grad_()
    total, routed = torch.zeros(()), 0
    for hidden, padding in seen:
        tokens = hidden[~padding]  # [n, hidden_size]
        logits = tokens @ weight.T
        probabilities = logits.softmax(dim=-1)
        chosen = torch.zeros_like(logits).scatter(1, logits.topk(moe.moe_router_topk).indices, 1.0)
        fraction = chosen.mean(dim=0) / moe.moe_router_topk
        balance = moe.num_moe_experts * (fraction * probabilities.mean(dim=0)).sum()
        z_loss = logits.exp().sum(dim=-1).log().square().mean()
        total = total + len(tokens) * (moe.moe_aux_loss_coeff * balance + moe.moe_z_loss_coeff * z_loss)
        routed += len(tokens)
    (total / routed).backward()
    names = [part.name for part in shards(trial.model, jobs.itself, pg_collection=trial.groups)]
    trial.close()
    return {next(name for name in names if "router" in name): weight.grad}


def ours(config: MM1Config, checkpoint, reference: dict[str, torch.Tensor], *, kind: str):
    """On every rank: squared errors of the router's gradient where the language model's loss counts nothing."""
    trial = jobs.Trial(config, backend="local")
    trial.load(checkpoint)
    with patch.object(step, "_loss", losses_of_the_router_alone(step._loss)):
        trial.backward(jobs.synthetic_share(config, kind, trial.groups))
    for chunk in trial.model:
        complete_gradients(chunk)
    parts = (part for part in shards(trial.model, jobs.main_grad, pg_collection=trial.groups) if part.name in reference)
    squares = squared_errors(parts, reference)
    trial.close()
    return squares


@pytest.fixture(scope="module")
def reference(pool, tmp_path_factory):
    """`reference(layout, kind)`: (checkpoint, the gradient in plain torch), for the batch of this layout."""
    known: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    checkpoints = []

    def get(layout, kind):
        config = layout.reference(IMAGES)
        if not checkpoints:
            checkpoints.extend(
                pool(1).run(jobs.save_initial, config, tmp_path_factory.mktemp("router"), backend="local")
            )
        key = layout.num_microbatches, kind
        if key not in known:
            [known[key]] = pool(1).run(plain_torch, config, checkpoints[0], kind=kind)
        return checkpoints[0], known[key]

    return get


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_gradient_of_its_losses_is_plain_torchs(pool, reference, name):
    """On a batch of 80 % image slots and on one that is mostly padding."""
    [layout] = choose_layouts(IMAGES, name, max_world_size=4)
    for kind in ("most images", "padding"):
        checkpoint, expected = reference(layout, kind)
        ranks = pool(layout.world_size).run(ours, layout.configure(IMAGES), checkpoint, expected, kind=kind)
        [(parameter, gradient)] = expected.items()
        assert gradient.norm() > 1e-5
        errors = relative_errors(ranks, expected, scales={parameter: float(gradient.norm())})
        assert errors[parameter] < 1e-4, kind


class SplitGroup:
    """A rank of a context-parallel group, for slicing alone."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def places_by_rank(num_tokens: int, *, tensor: int, context: int) -> list[torch.Tensor]:
    """Which positions of a flattened microbatch each rank of a layout has."""
    places = []
    for rank in range(context):
        chunks = [torch.arange(*chunk) for chunk in local_chunks(num_tokens, SplitGroup(rank, context))]
        held = torch.cat(chunks) if context > 1 else torch.arange(num_tokens)
        places += held.chunk(tensor)
    return places


def drop_as_ranks_would(right: Any, *, tensor: int, context: int) -> Any:
    def within_capacity(self, weights, chosen):
        kept = torch.empty_like(chosen)
        for places in places_by_rank(len(weights), tensor=tensor, context=context):
            kept[places] = right(self, weights[places], chosen[places])
        return kept

    return within_capacity


def reference_by_rank(*arguments, tensor: int, context: int, **options):
    """The reference of a layout whose ranks drop by themselves, in one process."""
    wrong = drop_as_ranks_would(Router._within_capacity, tensor=tensor, context=context)
    with patch.object(Router, "_within_capacity", wrong):
        return jobs.run_reference(*arguments, **options)


CAPACITY = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, moe=dataclasses.replace(CONFIG.model.moe, moe_expert_capacity_factor=0.7)),
)


@pytest.mark.parametrize(
    ("name", "tensor", "context"),
    [("TP2+SP EP2", 2, 1), ("CP2 EP2", 1, 2), ("TP2+SP CP2 EP2", 2, 2), ("PP2 CP2", 1, 2)],
)
def test_a_layout_drops_what_its_ranks_would(pool, name, tensor, context):
    """Which tokens share a rank decides what is dropped: the reference drops by the same shares, in one process."""
    [layout] = choose_layouts(CAPACITY, name, max_world_size=4)
    kinds = ("mixed", "most images", "padding")
    with Comparison(CAPACITY, kinds=kinds, steps=1) as by_itself:
        assert not by_itself.compare(layout, pool(layout.world_size)).passed
    reference = partial(reference_by_rank, tensor=tensor, context=context)
    with Comparison(CAPACITY, kinds=kinds, steps=1, reference=reference) as by_rank:
        result = by_rank.compare(layout, pool(layout.world_size))
    assert result.failure is None, result.failure
    assert [finding for finding in result.findings if not finding.passed] == []
