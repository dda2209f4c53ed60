"""The experts' router."""

import torch
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Router(TopKRouter):
    """megatron-core's top-k router with a load-balance loss that is the same however the sequence is split.

    Under sequence parallelism each rank adds its tokens' part of the loss, weighed by the tokens of the whole sequence.
    With a padding mask megatron-core 0.19 counts these once for each rank: it reduces the counts in place and then
    takes the sum for its own share.
    """

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """Attach the loss to `probs`; scores and map [tokens, experts] are zero where tokens are padding."""
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0:
            return probs
        tokens_per_expert = routing_map.sum(dim=0)
        torch.distributed.all_reduce(tokens_per_expert, group=self.tp_cp_group)
        num_tokens = tokens_per_expert.sum() / self.topk
        loss = switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=tokens_per_expert,
            total_num_tokens=num_tokens,
            topk=self.topk,
            num_experts=self.config.num_moe_experts,
            moe_aux_loss_coeff=coefficient,
        )
        return self.attach_and_log_load_balancing_loss(
            probs,
            coefficient,
            loss,
            "load_balancing_loss",
            self.tp_cp_group,
            valid_token_count=num_tokens / self.tp_cp_group.size(),
        )
