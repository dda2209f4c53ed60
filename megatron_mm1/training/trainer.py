"""The trainer: everything a run does, from top to bottom."""

import math
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm1.config import MM1Config
from megatron_mm1.config.serialization import to_dict, to_yaml
from megatron_mm1.config.validation import validate
from megatron_mm1.data.batch import PackedBatch
from megatron_mm1.data.loader import train_batches, validation_batches
from megatron_mm1.data.tokenizer import Tokenizer
from megatron_mm1.parallel.device import layer_backend, transformer_engine_problem
from megatron_mm1.parallel.groups import (
    build_process_groups,
    destroy_process_groups,
    initialize_process_group,
    launcher_ranks,
)
from megatron_mm1.planning.flops import step_flops
from megatron_mm1.training.build import (
    COMPONENTS,
    build_model,
    build_optimizer,
    component_learning_rates,
    component_of,
)
from megatron_mm1.training.checkpointing import (
    CheckpointMetadata,
    check_resumable,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    read_metadata,
    save_checkpoint,
)
from megatron_mm1.training.logging import RunLogger, console_line
from megatron_mm1.training.step import StepStatistics, train_step
from megatron_mm1.training.validation import validate_model


def train(config: MM1Config) -> None:
    """Train as `config` says: from scratch, from `checkpoint.load`, or on from this run's newest checkpoint.

    Raises:
        UserError: the configuration, the data or the checkpoint does not allow the run; nothing has been written.
    """
    validate(config, world_size=launcher_ranks()[1])
    backend = layer_backend(config.training.layer_backend)
    tokenizer = Tokenizer(config.data.tokenizer)
    start = _starting_point(config, tokenizer)

    initialize_process_group(timeout_minutes=config.parallel.distributed_timeout_minutes)
    try:
        groups = build_process_groups(config.parallel, seed=config.training.seed)
        _run(config, backend=backend, tokenizer=tokenizer, start=start, groups=groups)
        torch.distributed.barrier()
        destroy_process_groups()
    finally:
        torch.distributed.destroy_process_group()


def _starting_point(config: MM1Config, tokenizer: Tokenizer) -> tuple[Path, CheckpointMetadata] | None:
    """The checkpoint to start from, checked against the configuration; None to start from scratch."""
    if config.checkpoint.load is not None:
        checkpoint = find_checkpoint(config.checkpoint.load)
    elif (Path(config.run_dir) / "checkpoints" / "latest").is_file():
        checkpoint = find_checkpoint(config.run_dir)
    else:
        return None
    metadata = read_metadata(checkpoint)
    check_resumable(metadata, config, tokenizer_fingerprint=tokenizer.fingerprint)
    return checkpoint, metadata


def _run(
    config: MM1Config,
    *,
    backend: str,
    tokenizer: Tokenizer,
    start: tuple[Path, CheckpointMetadata] | None,
    groups: ProcessGroupCollection,
) -> None:
    training = config.training
    model = build_model(config, backend=backend, pg_collection=groups)
    optimizer, scheduler = build_optimizer(config, model, pg_collection=groups)

    iteration, consumed = 0, 0
    if start is not None:
        checkpoint, metadata = start
        if config.checkpoint.finetune and config.checkpoint.load is not None:
            load_weights(checkpoint, model, pg_collection=groups)
            optimizer.reload_model_params()
        else:
            load_checkpoint(checkpoint, model, optimizer, scheduler, pg_collection=groups)
            iteration, consumed = metadata.iteration, metadata.consumed_sequences

    is_first_stage = groups.pp.rank() == 0
    place = {"dp_rank": groups.dp.rank(), "dp_size": groups.dp.size(), "with_pixels": is_first_stage}
    batches = train_batches(config, tokenizer=tokenizer, consumed_sequences=consumed, **place)
    held_out = validation_batches(config, tokenizer=tokenizer, **place)
    num_microbatches = training.global_batch_size // (training.micro_batch_size * groups.dp.size())

    is_logger = torch.distributed.get_rank() == 0
    logger = RunLogger(config, iteration=iteration, enabled=is_logger)
    _introduce(config, model, backend=backend, start=start, logger=logger, groups=groups)
    if is_logger:
        (Path(config.run_dir) / "config.yaml").write_text(to_yaml(config))

    def validation() -> None:
        losses = validate_model(config, model, held_out, pg_collection=groups)
        logger.record("validation", iteration, losses)
        text = " | ".join(f"{name}: {loss:.4f}" for name, loss in losses.items())
        logger.say(f" validation at iteration {iteration} | {text} |")

    def save() -> None:
        metadata = CheckpointMetadata(
            iteration=iteration,
            consumed_sequences=consumed,
            config=to_dict(config),
            tokenizer_fingerprint=tokenizer.fingerprint,
        )
        folder = Path(config.run_dir) / "checkpoints"
        path = save_checkpoint(folder, metadata, model, optimizer, scheduler, pg_collection=groups)
        logger.say(f" saved {path}")

    window = _Window(config)
    if training.eval_interval and iteration < training.train_iters:
        validation()
    while iteration < training.train_iters:
        started = time.perf_counter()
        microbatches = list(islice(batches, num_microbatches))
        waited = time.perf_counter() - started
        is_logged = (iteration + 1) % config.logging.log_interval == 0 or iteration + 1 == training.train_iters
        rates = component_learning_rates(config, optimizer)  # the step's own: the scheduler moves on after it
        statistics = train_step(
            config, model, optimizer, scheduler, microbatches, pg_collection=groups, with_component_norms=is_logged
        )
        iteration += 1
        consumed += training.global_batch_size
        window.add(statistics, microbatches, seconds=time.perf_counter() - started, waited=waited)
        logger.progress(loss=statistics.losses.loss, **{"tokens/s": window.tokens_per_second})
        if is_logged:
            figures = window.figures(iteration, consumed, statistics, rates)
            logger.record("train", iteration, figures)
            logger.say(console_line(figures, train_iters=training.train_iters))
            window = _Window(config, skipped=window.skipped, nan=window.nan)
        if training.eval_interval and (iteration % training.eval_interval == 0 or iteration == training.train_iters):
            validation()
        is_last = iteration == training.train_iters
        if is_last or (config.checkpoint.save_interval and iteration % config.checkpoint.save_interval == 0):
            save()
    logger.close()


class _Window:
    """Figures over the steps since the last console line."""

    def __init__(self, config: MM1Config, *, skipped: int = 0, nan: int = 0) -> None:
        self.config = config
        self.steps = 0
        self.seconds = self.waited = 0.0
        self.images = 0
        self.skipped, self.nan = skipped, nan

    def add(self, statistics: StepStatistics, batches: list[PackedBatch], *, seconds: float, waited: float) -> None:
        self.steps += 1
        self.seconds += seconds
        self.waited += waited
        self.images += sum(batch.num_images for batch in batches)
        self.skipped += statistics.skipped
        self.nan += not math.isfinite(statistics.losses.loss)

    @property
    def sequences(self) -> int:
        return self.steps * self.config.training.global_batch_size

    @property
    def tokens_per_second(self) -> float:
        """Positions per second over all ranks, padding included."""
        return self.sequences * self.config.data.seq_length / self.seconds

    def figures(
        self, iteration: int, consumed: int, statistics: StepStatistics, rates: Mapping[str, float]
    ) -> dict[str, Any]:
        """What a console line and the logs say about the window and its last step."""
        world_size = torch.distributed.get_world_size()
        parallel = self.config.parallel
        model_parallel = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        flops = step_flops(
            self.config.model,
            seq_length=self.config.data.seq_length,
            num_sequences=self.sequences,
            num_images=self.images * (world_size // model_parallel),  # this rank's share, taken as typical
        )
        figures: dict[str, Any] = {
            "iteration": iteration,
            "consumed_samples": consumed,
            "elapsed_time_per_iteration_ms": 1000 * self.seconds / self.steps,
            "tflops_per_gpu": flops / self.seconds / world_size / 1e12,
            "learning_rate": rates["decoder"],
            "global_batch_size": self.config.training.global_batch_size,
            "lm_loss": statistics.losses.loss,
            "grad_norm": statistics.grad_norm,
            "skipped_iterations": self.skipped,
            "nan_iterations": self.nan,
        }
        for source, loss in zip(self.config.data.sources, statistics.losses.source_losses(), strict=False):
            if loss is not None:
                figures[f"loss {source.name}"] = loss
        for component in ("tower", "connector"):
            figures[f"learning_rate {component}"] = rates[component]
        for component, norm in (statistics.component_grad_norms or {}).items():
            figures[f"grad_norm {component}"] = norm
        figures["tokens_per_second"] = self.tokens_per_second
        figures["data_wait_ms"] = 1000 * self.waited / self.steps
        return figures


def _introduce(
    config: MM1Config,
    model: DistributedDataParallel,
    *,
    backend: str,
    start: tuple[Path, CheckpointMetadata] | None,
    logger: RunLogger,
    groups: ProcessGroupCollection,
) -> None:
    """Say once what is about to run."""
    counts = _trainable_parameters(model, groups)
    parallel = config.parallel
    layout = (
        f"{torch.distributed.get_world_size()} processes: tensor {parallel.tensor_model_parallel_size}"
        f"{' + sequence' if parallel.sequence_parallel else ''}, pipeline {parallel.pipeline_model_parallel_size}, "
        f"expert {parallel.expert_model_parallel_size}, data {groups.dp.size()}"
        f"{' (distributed optimizer)' if parallel.use_distributed_optimizer else ''}"
    )
    reason = (
        f" (Transformer Engine: {transformer_engine_problem()})"
        if backend == "local" and transformer_engine_problem()
        else ""
    )
    logger.say(f" {config.name}: {layout}")
    logger.say(f" layer backend: {backend}{reason}, precision {config.training.precision}")
    logger.say(
        " trainable parameters: "
        + ", ".join(f"{name} {count:,}" for name, count in counts.items())
        + f", in all {sum(counts.values()):,}"
    )
    if start is not None:
        logger.say(f" starting from {start[0]}")


def _trainable_parameters(model: DistributedDataParallel, groups: ProcessGroupCollection) -> dict[str, int]:
    """Trainable parameters of the whole model by component, each counted once however it is spread."""
    counts = torch.zeros(2, len(COMPONENTS), dtype=torch.int64)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or getattr(parameter, "shared", False):
            continue
        is_expert = not getattr(parameter, "allreduce", True)
        is_split = getattr(parameter, "tensor_model_parallel", False)
        if is_expert or is_split or groups.tp.rank() == 0:
            counts[int(is_expert), COMPONENTS.index(component_of(name))] += parameter.numel()
    dense, expert = counts.to(next(model.parameters()).device)
    torch.distributed.all_reduce(dense, group=groups.mp)
    torch.distributed.all_reduce(expert, group=groups.tp_ep_pp)
    return dict(zip(COMPONENTS, (dense + expert).tolist(), strict=True))
