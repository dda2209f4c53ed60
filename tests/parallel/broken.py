"""Jobs that break one rule of parallel training and then compare a layout as `mm1 parity` does."""

import dataclasses
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from megatron_mm1.model import mm1, norms, router
from megatron_mm1.model.router import PADDING, TEXT
from megatron_mm1.parallel import context, vision_work
from megatron_mm1.parity import jobs
from megatron_mm1.training import build, step


@contextmanager
def replaced(where: Any, name: str, make: Callable[[Any], Any]):
    """`where.name` as `make` turns it, for the length of a job; the workers go on to other jobs."""
    with patch.object(where, name, make(getattr(where, name))):
        yield


def tower_gradients_not_summed(*args, **kwargs):
    with replaced(mm1.MM1Model, "finalize_vision_gradients", lambda right: lambda self: None):
        return jobs.run_layout(*args, **kwargs)


def segments_see_each_other(*args, **kwargs):
    def causal(segment_ids, group=None):
        return torch.ones(len(segment_ids), 1, *2 * segment_ids.shape[1:], dtype=torch.bool).tril()

    with replaced(mm1, "segment_mask", lambda right: causal):
        return jobs.run_layout(*args, **kwargs)


def padding_routed(*args, **kwargs):
    def wrong(right):
        return lambda batch: right(batch).masked_fill_(right(batch) == PADDING, TEXT)

    with replaced(mm1, "position_kinds", wrong):
        return jobs.run_layout(*args, **kwargs)


def image_slots_off_by_one(*args, **kwargs):
    def wrong(right):
        def embed(self, batch, **options):
            images = tuple(
                dataclasses.replace(group, slots=(group.slots + 1) % batch.tokens.numel()) for group in batch.images
            )
            return right(self, dataclasses.replace(batch, images=images), **options)

        return embed

    with replaced(mm1.MM1Model, "embed", wrong):
        return jobs.run_layout(*args, **kwargs)


def context_halves_swapped(*args, **kwargs):
    with replaced(context, "local_chunks", lambda right: lambda *positions: right(*positions)[::-1]):
        return jobs.run_layout(*args, **kwargs)


def loss_averaged_by_microbatch(*args, **kwargs):
    def wrong(right):
        def loss(*arguments, **options):
            total, count, statistics = right(*arguments, **options)
            return total / count.clamp(min=1), torch.ones_like(count), statistics

        return loss

    with replaced(step, "_loss", wrong):
        return jobs.run_layout(*args, **kwargs)


def image_gradients_of_other_ranks_dropped(*args, **kwargs):
    def wrong(right):
        def backward(ctx, *gradients):
            start, stop = ctx.span
            return gradients[0][start:stop].contiguous(), None, None, None

        return staticmethod(backward)

    with replaced(vision_work._GatherImages, "backward", wrong):
        return jobs.run_layout(*args, **kwargs)


def norms_not_summed_over_the_sequence(*args, **kwargs):
    def wrong(right):
        def init(self, *arguments, **options):
            right(self, *arguments, **options)
            for parameter in self.parameters():
                parameter.sequence_parallel = False

        return init

    with replaced(norms.LocalNorm, "__init__", wrong):
        return jobs.run_layout(*args, **kwargs)


def router_losses_not_scaled(*args, **kwargs):
    def unscaled(model, *arguments):
        for chunk in model:
            build.unwrap(chunk).config.moe_grad_scale_func = lambda: torch.ones(())

    with replaced(step, "_scale_router_losses", lambda right: unscaled):
        return jobs.run_layout(*args, **kwargs)


def balance_loss_of_the_ranks_own_tokens(*args, **kwargs):
    def wrong(right):
        def apply(self, *arguments):
            groups, self.tp_cp_group = (
                self.tp_cp_group,
                torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True),
            )
            try:
                return right(self, *arguments)
            finally:
                self.tp_cp_group = groups

        return apply

    with replaced(router.Router, "_with_balance_loss", wrong):
        return jobs.run_layout(*args, **kwargs)


def raises(*args, **kwargs):
    raise RuntimeError("broken on purpose")


DENSE, MOE = "mm1-tiny", "mm1-tiny-moe"
RULES: dict[Callable[..., Any], tuple[str, str, tuple[str, ...]]] = {
    tower_gradients_not_summed: (DENSE, "TP2+SP images shared", ("mixed", "most images")),
    segments_see_each_other: (DENSE, "TP2", ("mixed", "one-token examples")),
    padding_routed: (MOE, "EP2 DP2", ("padding",)),
    image_slots_off_by_one: (DENSE, "PP2", ("mixed", "images at both ends", "two resolutions")),
    context_halves_swapped: (DENSE, "CP2", ("mixed", "no image", "one example")),
    loss_averaged_by_microbatch: (DENSE, "DP2", ("unequal tokens", "mixed")),
    image_gradients_of_other_ranks_dropped: (DENSE, "CP2 images shared", ("most images",)),
    norms_not_summed_over_the_sequence: (DENSE, "TP2+SP", ("no image",)),
    router_losses_not_scaled: (MOE, "EP2 DP2", ("most images", "mixed")),
    balance_loss_of_the_ranks_own_tokens: (MOE, "TP2+SP EP2", ("mixed", "one-token examples")),
}
"""By job: preset, layout and the kinds of batch that must show it."""
