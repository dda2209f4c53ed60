"""The experts' router: who goes where, what is dropped, the two losses, and a tally of all that by modality."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_mm1.config.schema import Fp8Recipe
from megatron_mm1.model.precision import multiplying, with_recipe

MODALITIES = ("text", "image")
TEXT, IMAGE, PADDING = range(3)
"""Kinds of positions."""


class ExpertsLayer(MoELayer):
    """megatron-core's layer of experts, told the kind of each position where megatron-core tells only padding.

    Args:
        recipe: how the experts' linear layers multiply; None where no backend has a choice.
    """

    def __init__(self, config: TransformerConfig, *args: Any, recipe: Fp8Recipe | None = None, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.expert_config = None if recipe is None else with_recipe(config, recipe)

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, H] -> ([s, b, H], None); `padding_mask`: [b, s] TEXT, IMAGE or PADDING."""
        if padding_mask is not None:
            self.router.kinds = padding_mask.transpose(0, 1).flatten()
            padding_mask = padding_mask == PADDING
        return super().forward(hidden_states, intermediate_tensors, padding_mask)

    def routed_experts_compute(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the experts of this rank make of the tokens sent to them, as in megatron-core."""
        if self.expert_config is None:
            return super().routed_experts_compute(hidden_states, probs)
        assert self.layer_number is not None
        with multiplying(self.expert_config, layer=self.layer_number - 1):
            return super().routed_experts_compute(hidden_states, probs)


class Router(TopKRouter):
    """Top-k routing that leaves padding out, and whose losses are the same however a microbatch is split.

    megatron-core 0.19 leaves padding out of the losses only. It is sent to experts all the same, takes their
    capacity, and with a padding mask the load-balance loss counts a sequence's tokens once for each rank that holds a
    part.

    Attributes:
        kinds: [tokens] of the coming call; None: all text.
        tally: [modality, experts + 3] float64 of the calls since it was last set to None: tokens sent to each expert,
            dropped, the sum of the routers' entropies (nats), tokens. Calls that are recomputed count again.
    """

    kinds: Tensor | None = None
    tally: Tensor | None = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            logits: [s, b, experts].
            padding_mask: [s, b], True where a position is padding.

        Returns:
            Weights [tokens, experts], and a map of the same shape that is True where a token goes; both empty in
            rows of padding.
        """
        logits = logits.view(-1, self.config.num_moe_experts)
        routed = torch.ones_like(logits[:, :1], dtype=torch.bool)  # [tokens, 1]
        if padding_mask is not None:
            routed = ~padding_mask.reshape(-1, 1)
        with_losses = self.training and torch.is_grad_enabled()
        if with_losses:
            logits = self._with_z_loss(logits, routed)
        weights, chosen = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
        )
        chosen, weights = chosen & routed, weights * routed
        kept = chosen & self._within_capacity(weights, chosen) if self.training else chosen
        if with_losses:
            weights = self._with_balance_loss(weights, logits, routed)
        self._apply_expert_bias(chosen)
        if self.training and self.kinds is not None:
            self._count(logits.detach(), chosen, kept)
        return weights * kept, kept

    def _with_z_loss(self, logits: Tensor, routed: Tensor) -> Tensor:
        """Attach coefficient x sum of squared log-sum-exp over this rank's tokens (ST-MoE); the training step divides
        all gradients by one number and makes it a mean."""
        z_loss = (logits.logsumexp(dim=-1, keepdim=True).square() * routed).sum()
        return MoEAuxLossAutoScaler.apply(logits, (self.config.moe_z_loss_coeff or 0.0) * z_loss)

    def _with_balance_loss(self, weights: Tensor, logits: Tensor, routed: Tensor) -> Tensor:
        """Attach this rank's part of the load-balance loss of the whole microbatch, times its tokens."""
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0:
            return weights
        chosen, scores = compute_routing_scores_for_aux_loss(
            logits, self.topk, self.score_function, padding_mask=~routed.squeeze(1)
        )
        tokens_per_expert = chosen.sum(dim=0)
        torch.distributed.all_reduce(tokens_per_expert, group=self.tp_cp_group)
        num_tokens = tokens_per_expert.sum() / self.topk
        loss = switch_load_balancing_loss_func(
            probs=scores,
            tokens_per_expert=tokens_per_expert,
            total_num_tokens=num_tokens.clamp(min=1),
            topk=self.topk,
            num_experts=self.config.num_moe_experts,
            moe_aux_loss_coeff=coefficient,
        )
        return MoEAuxLossAutoScaler.apply(weights, loss * num_tokens)

    def _within_capacity(self, weights: Tensor, chosen: Tensor) -> Tensor:
        """[tokens, experts] True for the most probable tokens of each expert, as many as it takes from a rank."""
        factor = self.config.moe_expert_capacity_factor
        if factor == float("inf"):
            return torch.ones_like(chosen)
        capacity = (factor * chosen.sum() / self.config.num_moe_experts).ceil()
        order = weights.detach().masked_fill(~chosen, -1.0).argsort(dim=0, descending=True, stable=True)
        return order.argsort(dim=0) < capacity  # the place of each token in its expert's order

    @torch.no_grad()
    def _count(self, logits: Tensor, chosen: Tensor, kept: Tensor) -> None:
        log_scores = logits.log_softmax(dim=-1)
        entropy = -(log_scores.exp() * log_scores).sum(dim=-1, keepdim=True)
        dropped = (chosen & ~kept).sum(dim=-1, keepdim=True)
        figures = torch.cat([chosen, dropped, entropy, torch.ones_like(entropy)], dim=1)  # [tokens, experts + 3]
        assert self.kinds is not None
        kinds, self.kinds = self.kinds, None
        of_modality = torch.stack([torch.eq(kinds, kind) for kind in (TEXT, IMAGE)]).to(figures)
        tally = (of_modality @ figures).double()
        self.tally = tally if self.tally is None else self.tally + tally
