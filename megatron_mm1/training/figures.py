"""The figures a run reports: of the steps since the last console line, and of the model as it starts."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm1.config import MM1Config
from megatron_mm1.config.derived import COMPONENTS, fp8_recipes, lora_targets
from megatron_mm1.data.balance import imbalance
from megatron_mm1.parallel.device import transformer_engine_problem
from megatron_mm1.planning.flops import step_flops
from megatron_mm1.training.build import Model, component_of, named_parameters
from megatron_mm1.training.step import StepStatistics


class Window:
    """What happened since the last console line.

    Args:
        skipped, nan: counts of the run so far, which go on counting.
    """

    def __init__(self, config: MM1Config, *, skipped: int = 0, nan: int = 0) -> None:
        self.config = config
        self.steps = self.sequences = 0
        self.seconds = self.waited = 0.0
        self.images = self.batch_size = 0
        self.imbalance = 0.0  # of images over data-parallel ranks, summed over the steps
        self.skipped, self.nan = skipped, nan

    def add(
        self,
        statistics: StepStatistics,
        images_per_rank: np.ndarray,
        *,
        sequences: int,
        seconds: float,
        waited: float,
    ) -> None:
        """Count one step.

        Args:
            sequences: of its global batch.
            images_per_rank: [data-parallel size] images of its global batch (`Dealer.images_per_rank`).
            seconds, waited: how long it took, and how long of that it waited for data.
        """
        self.steps += 1
        self.sequences += sequences
        self.batch_size = sequences
        self.seconds += seconds
        self.waited += waited
        self.images += int(images_per_rank.sum())
        self.imbalance += imbalance(images_per_rank)
        self.skipped += statistics.skipped
        self.nan += any(statistics.losses.token_counts) and not math.isfinite(statistics.losses.loss)

    @property
    def tokens_per_second(self) -> float:
        """Positions per second over all ranks, padding included."""
        return self.sequences * self.config.data.seq_length / self.seconds

    def figures(
        self, iteration: int, consumed: int, statistics: StepStatistics, rates: Mapping[str, float]
    ) -> dict[str, Any]:
        """For the console line and the logs.

        Args:
            iteration, consumed: steps and sequences of the run so far.
            statistics: of the window's last step.
            rates: its learning rate by component.
        """
        world_size = torch.distributed.get_world_size()
        flops = step_flops(
            self.config.model,
            seq_length=self.config.data.seq_length,
            num_sequences=self.sequences,
            num_images=self.images,
        )
        figures: dict[str, Any] = {
            "iteration": iteration,
            "consumed_samples": consumed,
            "elapsed_time_per_iteration_ms": 1000 * self.seconds / self.steps,
            "tflops_per_gpu": flops / self.seconds / world_size / 1e12,
            "learning_rate": rates.get("decoder", max(rates.values())),
            "global_batch_size": self.batch_size,
            "lm_loss": statistics.losses.loss,
            "grad_norm": statistics.grad_norm,
            "skipped_iterations": self.skipped,
            "nan_iterations": self.nan,
        }
        for source, loss in zip(self.config.data.sources, statistics.losses.source_losses(), strict=False):
            if loss is not None:
                figures[f"loss {source.name}"] = loss
        for component in ("tower", "connector"):
            if component in rates:
                figures[f"learning_rate {component}"] = rates[component]
        for component, norm in (statistics.component_grad_norms or {}).items():
            figures[f"grad_norm {component}"] = norm
        figures["tokens_per_second"] = self.tokens_per_second
        figures["data_wait_ms"] = 1000 * self.waited / self.steps
        figures["image_imbalance"] = self.imbalance / self.steps
        return figures


def introduction(config: MM1Config, model: Model, *, backend: str, groups: ProcessGroupCollection) -> list[str]:
    """Lines that say what is about to run; every rank must call it."""
    counts = trainable_parameters(model, groups=groups)
    parallel = config.parallel
    sizes = [
        f"tensor {parallel.tensor_model_parallel_size}{' + sequence' if parallel.sequence_parallel else ''}",
        f"pipeline {parallel.pipeline_model_parallel_size}",
    ]
    further = {
        "virtual": parallel.virtual_pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
        "expert": parallel.expert_model_parallel_size,
        "expert tensor": parallel.expert_tensor_parallel_size,
    }
    sizes += [f"{name} {size}" for name, size in further.items() if size > 1]
    sizes.append(f"data {groups.dp.size()}{' (distributed optimizer)' if parallel.use_distributed_optimizer else ''}")
    layout = f"{torch.distributed.get_world_size()} processes: {', '.join(sizes)}"
    if config.training.freeze:
        layout += f"; frozen: {', '.join(config.training.freeze)}"
    if adapted := [component for component in COMPONENTS if lora_targets(config.model.lora, component)]:
        layout += f"; adapters: {', '.join(adapted)}"
    problem = transformer_engine_problem()
    reason = f" (Transformer Engine: {problem})" if problem else ""
    listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return [
        f" {config.name}: {layout}",
        f" layer backend: {backend}{reason}, {_precision(config)}",
        f" trainable parameters: {listed}, in all {sum(counts.values()):,}",
    ]


def _precision(config: MM1Config) -> str:
    components = ["tower", "connector", "decoder", *(["experts"] if config.model.moe else [])]
    recipes = fp8_recipes(config.fp8)
    in_fp8 = [f"{component} {recipes[component]}" for component in components if recipes[component] != "bf16"]
    return f"precision {config.training.precision}" + (f", in FP8: {', '.join(in_fp8)}" if in_fp8 else "")


def trainable_parameters(model: Model, *, groups: ProcessGroupCollection) -> dict[str, int]:
    """Trainable parameters of the whole model by component, each counted once however it is spread."""
    counts = torch.zeros(2, len(COMPONENTS), dtype=torch.int64)
    for name, parameter in named_parameters(model):
        if not parameter.requires_grad or getattr(parameter, "shared", False):
            continue
        is_expert = not getattr(parameter, "allreduce", True)
        is_split = getattr(parameter, "tensor_model_parallel", False)
        if is_expert or is_split or groups.tp.rank() == 0:
            counts[int(is_expert), list(COMPONENTS).index(component_of(name))] += parameter.numel()
    dense, expert = counts.to(next(model[0].parameters()).device)
    torch.distributed.all_reduce(dense, group=groups.mp)
    torch.distributed.all_reduce(expert, group=groups.tp_ep_pp)
    return dict(zip(COMPONENTS, (dense + expert).tolist(), strict=True))
