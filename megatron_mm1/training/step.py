"""One optimizer step, or one forward-only pass, over a list of microbatches."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from megatron_mm1.config import MM1Config
from megatron_mm1.config.batch_sizes import BatchSizes
from megatron_mm1.config.derived import uses_fp8
from megatron_mm1.data.batch import IGNORE, PackedBatch
from megatron_mm1.parallel.context import local_positions
from megatron_mm1.parallel.device import device
from megatron_mm1.training.build import Model, unwrap
from megatron_mm1.training.freezing import frozen_components, hold_weights, without_gradients
from megatron_mm1.training.gradients import component_gradient_norms
from megatron_mm1.training.routing import expert_biases


@dataclass(frozen=True)
class LossStatistics:
    """Losses of a global batch, the same on every rank.

    Attributes:
        loss_sums: per source, the sum of the losses of its trained tokens.
        token_counts: per source, the number of trained tokens.
    """

    loss_sums: tuple[float, ...]
    token_counts: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Mean loss of a trained token."""
        return sum(self.loss_sums) / max(sum(self.token_counts), 1)

    def source_losses(self) -> tuple[float | None, ...]:
        """Mean loss by source; None where the batch trained none of its tokens."""
        pairs = zip(self.loss_sums, self.token_counts, strict=True)
        return tuple(total / count if count else None for total, count in pairs)


@dataclass(frozen=True)
class StepStatistics:
    """What one optimizer step did.

    Attributes:
        losses: of the global batch, before the update.
        grad_norm: global gradient norm before clipping.
        component_grad_norms: the same by component; None unless asked for.
        skipped: the update was not applied, and the weights are what they were.
    """

    losses: LossStatistics
    grad_norm: float
    component_grad_norms: dict[str, float] | None
    skipped: bool


Accept = Callable[[float, float], bool]
"""Whether an update is applied, from the loss and the gradient norm before clipping; the same on every rank."""


def is_finite(loss: float, grad_norm: float) -> bool:
    """Accept whatever does not destroy the weights."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


def train_step(
    config: MM1Config,
    model: Model,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    batches: Sequence[PackedBatch],
    *,
    pg_collection: ProcessGroupCollection,
    with_component_norms: bool = False,
    accept: Accept = is_finite,
) -> StepStatistics:
    """Forward and backward over this rank's microbatches of one global batch, then one update if it is accepted.

    A step that is not accepted leaves weights and optimizer state, Adam's count of steps included, as if there had been
    none; the schedule moves on, as it goes by the sequences that are over.

    Args:
        batches: this rank's share of the global batch, on the host.
        with_component_norms: also compute gradient norms by component.
        accept: must not accept what is not finite.
    """
    optimizer.zero_grad()
    frozen = frozen_components(config.training, consumed_sequences=int(scheduler.num_steps))
    biases = [(bias, bias.clone()) for bias in expert_biases(model)]
    with without_gradients(model, frozen):
        losses = forward_backward(config, model, batches, pg_collection=pg_collection)
    hold_weights(optimizer, frozen)
    norms = component_gradient_norms(model, optimizer, pg_collection=pg_collection) if with_component_norms else None
    grad_norm, updated = update_weights(config, optimizer, accept=partial(accept, losses.loss))
    if not updated:
        for bias, before in biases:  # moved at the end of the backward pass
            bias.copy_(before)
    _advance(config, scheduler)
    return StepStatistics(losses=losses, grad_norm=grad_norm, component_grad_norms=norms, skipped=not updated)


def pass_over(config: MM1Config, scheduler: OptimizerParamScheduler) -> StepStatistics:
    """What `train_step` leaves of a step that is not accepted, without the step."""
    _advance(config, scheduler)
    nothing = LossStatistics(loss_sums=(math.nan,), token_counts=(0.0,))
    return StepStatistics(losses=nothing, grad_norm=math.nan, component_grad_norms=None, skipped=True)


def _advance(config: MM1Config, scheduler: OptimizerParamScheduler) -> None:
    """Move the schedule over the coming global batch."""
    batch_sizes = BatchSizes.of(config.training)
    scheduler.step(increment=batch_sizes.at(batch_sizes.step_of(int(scheduler.num_steps))))


def update_weights(
    config: MM1Config, optimizer: MegatronOptimizer, *, accept: Callable[[float], bool] = math.isfinite
) -> tuple[float, bool]:
    """The optimizer's step on clipped gradients, left out unless their norm is accepted.

    Returns:
        The global gradient norm before clipping, and whether the weights were updated.
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    # The optimizer does not look: an infinite norm would turn clipped gradients into NaN, a NaN goes through.
    if not accept(grad_norm):
        return grad_norm, False
    if config.optimizer.clip_grad > 0:  # here and not in optimizer.step(), which would compute the norm again
        clip_grads_with_norm_(optimizer.get_parameters(), config.optimizer.clip_grad, torch.tensor(grad_norm))
    optimizer.step_with_ready_grads()
    return grad_norm, True


def forward_backward(
    config: MM1Config, model: Model, batches: Sequence[PackedBatch], *, pg_collection: ProcessGroupCollection
) -> LossStatistics:
    """Losses of this rank's microbatches of one global batch; leaves its gradient in the parameters' `main_grad`.

    Call the optimizer's `zero_grad` first: its step leaves gradients that would be added to.
    """
    for chunk in model:
        chunk.train()
        chunk.zero_grad_buffer()
    _scale_router_losses(model, batches, pg_collection)
    return run_batches(config, model, batches, pg_collection=pg_collection, forward_only=False)


@torch.no_grad()
def evaluate_batches(
    config: MM1Config,
    model: Model,
    batches: Sequence[PackedBatch],
    *,
    pg_collection: ProcessGroupCollection,
) -> LossStatistics:
    """Losses without an update; the model is left in the mode it was in."""
    was_training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    losses = run_batches(config, model, batches, pg_collection=pg_collection, forward_only=True)
    for chunk, mode in zip(model, was_training, strict=True):
        chunk.train(mode)
    return losses


def run_batches(
    config: MM1Config,
    model: Model,
    batches: Sequence[PackedBatch],
    *,
    pg_collection: ProcessGroupCollection,
    forward_only: bool,
) -> LossStatistics:
    """megatron-core's pipeline schedule over the microbatches; gradients end up reduced and divided by the trained
    tokens.
    """
    if uses_fp8(config.fp8):
        renew_fp8_weights(model)
    num_sources = max(len(config.data.sources), len(config.data.validation), 1)
    rows, seq_length = batches[0].tokens.shape
    pp_size = pg_collection.pp.size()
    is_virtual = len(model) > 1
    schedule = get_forward_backward_func(pp_size=pp_size, vp_size=len(model) if is_virtual else None)
    transformer_config = unwrap(model[0]).config
    outputs = schedule(
        forward_step_func=partial(_forward_step, num_sources=num_sources),
        data_iterator=[iter(batches) for _ in model] if is_virtual else iter(batches),
        model=model,
        num_microbatches=len(batches),
        # The decoder sees a microbatch as one flattened sequence.
        seq_length=rows * seq_length,
        micro_batch_size=1,
        forward_only=forward_only,
        p2p_communicator=P2PCommunicator(pp_group=pg_collection.pp, config=transformer_config) if pp_size > 1 else None,
        pg_collection=pg_collection,
    )
    return _global_statistics(outputs, num_sources, pg_collection)


def renew_fp8_weights(model: Sequence[torch.nn.Module]) -> None:
    """Layers that multiply in FP8 keep a copy of their weights from one microbatch to the next: make the coming one
    renew it. megatron-core's schedules do so where the decoder is in FP8, and not where the tower or the experts are.
    """
    for chunk in model:
        for module in chunk.modules():
            if hasattr(module, "is_first_microbatch"):
                module.is_first_microbatch = True  # type: ignore[assignment]


def _forward_step(
    data_iterator: Iterator[PackedBatch], model: torch.nn.Module, *, num_sources: int
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    batch, stage = next(data_iterator), unwrap(model)
    if not stage.pre_process:
        batch = batch.without_pixels()
    batch = batch.to(device())
    labels, sources = (
        local_positions(tensor.flatten(), stage.pg_collection.cp) for tensor in (batch.labels, batch.source_ids)
    )
    return model(batch), partial(_loss, labels, sources, num_sources=num_sources)


def _loss(labels: Tensor, sources: Tensor, losses: Tensor, *, num_sources: int) -> tuple[Tensor, Tensor, Tensor]:
    """(summed loss, trained tokens, statistics [2, sources]) of this rank's positions of a microbatch, as the schedule
    takes them; all arguments are [positions].
    """
    trained = labels != IGNORE
    losses = losses.masked_fill(~trained, 0.0)
    statistics = torch.zeros(2, num_sources, dtype=torch.float64, device=losses.device)
    statistics[0].index_add_(0, sources, losses.detach().double())
    statistics[1].index_add_(0, sources, trained.double())
    return losses.sum(), trained.sum().int(), statistics


def _global_statistics(
    outputs: list[Tensor], num_sources: int, pg_collection: ProcessGroupCollection
) -> LossStatistics:
    """Sum over microbatches, data- and context-parallel ranks, and hand the result to every pipeline stage."""
    total = torch.zeros(2, num_sources, dtype=torch.float64, device=device())
    for statistics in outputs:  # empty but on the last stage
        total += statistics
    pp = pg_collection.pp
    if pp.rank() == pp.size() - 1:
        torch.distributed.all_reduce(total, group=pg_collection.dp_cp)
    torch.distributed.broadcast(total, group_src=pp.size() - 1, group=pp)
    loss_sums, token_counts = total.tolist()
    return LossStatistics(loss_sums=tuple(loss_sums), token_counts=tuple(token_counts))


def _scale_router_losses(model: Model, batches: Sequence[PackedBatch], pg_collection: ProcessGroupCollection) -> None:
    """Make the router's auxiliary losses means over the tokens they are computed on.

    megatron-core weighs them by the tokens that are not padding and then divides every gradient by the trained
    tokens, of which a batch of captions has several times fewer: without this factor the losses would weigh as much
    more.
    """
    if not unwrap(model[0]).config.num_moe_experts:
        return
    counts = torch.zeros(2, dtype=torch.float32)
    for batch in batches:
        counts += torch.stack([(batch.labels != IGNORE).sum(), (batch.segment_ids != 0).sum()])
    counts = counts.to(device(), non_blocking=True)
    torch.distributed.all_reduce(counts, group=pg_collection.dp_cp)
    # Only the first and last stage know which images could not be decoded, and so which examples are not trained.
    torch.distributed.broadcast(counts, group_src=pg_collection.pp.size() - 1, group=pg_collection.pp)
    trained, routed = counts
    scale = trained / routed.clamp(min=1)
    for chunk in model:
        unwrap(chunk).config.moe_grad_scale_func = lambda: scale
