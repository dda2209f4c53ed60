"""How the experts are used: load, drop rate and entropy by block and modality."""

from collections.abc import Iterator

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm1.config import MM1Config
from megatron_mm1.model.router import MODALITIES, Router
from megatron_mm1.parallel.device import device
from megatron_mm1.training.build import Model, unwrap


def routing_figures(config: MM1Config, model: Model, *, pg_collection: ProcessGroupCollection) -> dict[str, float]:
    """Figures of the training steps since the last call; every rank calls it, and only the first stage's need them.

    Returns:
        For each block with experts and each modality that it has seen:
        `moe block {number} {modality} load`, the busiest expert's tokens over the mean (1: even);
        `.. drop rate`, the share of choices that capacity did not allow;
        `.. entropy`, mean entropy of the router's distribution over experts, nats (ln experts: undecided).
        Blocks count from 0. Empty without experts.
    """
    moe = config.model.moe
    if moe is None:
        return {}
    experts = moe.num_moe_experts
    tallies = torch.zeros(
        config.model.decoder.num_layers, len(MODALITIES), experts + 3, dtype=torch.float64, device=device()
    )
    for chunk in model:
        for router in unwrap(chunk).modules():
            if isinstance(router, Router) and router.tally is not None:
                assert router.layer_number is not None
                tallies[(router.layer_number - 1) // 2] += router.tally  # a block is two layers, which count from 1
                router.tally = None
    torch.distributed.all_reduce(tallies, group=pg_collection.tp_dp_cp)
    torch.distributed.all_reduce(tallies, group=pg_collection.pp)
    figures = {}
    for block, of_block in enumerate(tallies):
        for modality, tally in zip(MODALITIES, of_block, strict=True):
            chosen, (dropped, entropy, tokens) = tally[:experts], tally[experts:].tolist()
            if tokens:
                name = f"moe block {block} {modality}"
                figures[f"{name} load"] = float(chosen.max() / chosen.mean())
                figures[f"{name} drop rate"] = dropped / float(chosen.sum())
                figures[f"{name} entropy"] = entropy / tokens
    return figures


def expert_biases(model: Model) -> Iterator[torch.Tensor]:
    """The live biases of the choice of experts (moe_router_enable_expert_bias), which move without a gradient."""
    for chunk in model:
        for router in unwrap(chunk).modules():
            if isinstance(router, Router) and router.expert_bias is not None:
                yield router.expert_bias
