"""The trainer: everything a run does, from top to bottom."""

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm1.checkpoint.format import CheckpointMetadata
from megatron_mm1.config import MM1Config
from megatron_mm1.config.serialization import to_dict, to_yaml
from megatron_mm1.config.validation import validate
from megatron_mm1.data.balance import Dealer
from megatron_mm1.data.batch import PackedBatch
from megatron_mm1.data.loader import train_batches, validation_batches
from megatron_mm1.data.plan import training_data
from megatron_mm1.data.tokenizer import Tokenizer, open_tokenizer
from megatron_mm1.errors import UserError
from megatron_mm1.faults.watch import Pulse, watched
from megatron_mm1.parallel.device import layer_backend
from megatron_mm1.parallel.groups import (
    build_process_groups,
    destroy_process_groups,
    initialize_process_group,
    launcher_ranks,
)
from megatron_mm1.planning.fp8 import check_fp8_shapes
from megatron_mm1.training.build import build_model, build_optimizer, component_learning_rates
from megatron_mm1.training.checkpointing import load_checkpoint, load_weights, training_state
from megatron_mm1.training.figures import Window, introduction
from megatron_mm1.training.logging import RunLogger, console_line
from megatron_mm1.training.resume import Start, check_ranks_agree, starting_point
from megatron_mm1.training.routing import routing_figures
from megatron_mm1.training.saving import CheckpointSaver
from megatron_mm1.training.step import StepStatistics, train_step
from megatron_mm1.training.validation import validate_model


def train(config: MM1Config) -> None:
    """Train as `config` says: from scratch, from `checkpoint.load`, or on from this run's newest checkpoint.

    Raises:
        UserError: the configuration, the data or the checkpoint does not allow the run; nothing has been written.
    """
    validate(config, world_size=launcher_ranks()[1])
    check_fp8_shapes(config)
    backend = layer_backend(config)
    tokenizer = open_tokenizer(config.data.tokenizer)
    start = starting_point(config, tokenizer)

    parallel = config.parallel
    store = initialize_process_group(timeout_minutes=parallel.distributed_timeout_minutes)
    try:
        with watched(
            store,
            rank=torch.distributed.get_rank(),
            world_size=torch.distributed.get_world_size(),
            silence_limit=parallel.heartbeat_timeout_seconds,
            # A little before the collectives give up: NCCL's watchdog aborts a process that may not be to blame.
            standstill_limit=60 * parallel.distributed_timeout_minutes - 5,
        ) as pulse:
            check_ranks_agree(start)
            groups = build_process_groups(parallel, seed=config.training.seed)
            Run(config, backend=backend, tokenizer=tokenizer, start=start, groups=groups, pulse=pulse).train()
            torch.distributed.barrier()
        destroy_process_groups()
    finally:
        torch.distributed.destroy_process_group()


class Run:
    """One run on this rank: what it is made of, and its loop.

    Attributes:
        iteration: optimizer steps taken.
        consumed: sequences of the training plan used, on all ranks together.
    """

    def __init__(
        self,
        config: MM1Config,
        *,
        backend: str,
        tokenizer: Tokenizer,
        start: Start | None,
        groups: ProcessGroupCollection,
        pulse: Pulse | None = None,
    ) -> None:
        self.config, self.tokenizer, self.groups = config, tokenizer, groups
        self.pulse = pulse or Pulse()
        self.iteration = self.consumed = 0
        self.data = training_data(config, tokenizer=tokenizer)
        encodes = groups.pp.rank() == 0
        place = {"dp_rank": groups.dp.rank(), "dp_size": groups.dp.size(), "with_pixels": encodes}
        self.held_out = validation_batches(config, tokenizer=tokenizer, **place)

        self.model = build_model(config, backend=backend, pg_collection=groups)
        self.optimizer, self.scheduler = build_optimizer(config, self.model, pg_collection=groups)
        self.missing: tuple[str, ...] = ()
        self.without_scales: tuple[str, ...] = ()
        self.goes_on_with_other_data = False
        if start is not None:
            self._load(start)

        self.num_microbatches = config.training.global_batch_size // (
            config.training.micro_batch_size * groups.dp.size()
        )
        self.batches: Iterator[PackedBatch] = train_batches(
            config, tokenizer=tokenizer, consumed_sequences=self.consumed, data=self.data, **place
        )
        self.dealer = Dealer.of(config, self.data.plan, dp_size=groups.dp.size())
        is_logger = torch.distributed.get_rank() == 0
        wandb_run_id = None if start is None or start.weights_only else start.metadata.wandb_run_id
        self.logger = RunLogger(config, iteration=self.iteration, enabled=is_logger, wandb_run_id=wandb_run_id)
        for line in introduction(config, self.model, backend=backend, groups=groups):
            self.logger.say(line)
        if start is not None:
            self.logger.say(f" starting from {start.checkpoint}")
            if self.missing:
                self.logger.say(f" not in it, and so drawn anew: {', '.join(self.missing)}")
            if self.without_scales:
                parts = ", ".join(self.without_scales)
                self.logger.say(f" without FP8 scales of: {parts}; their histories of largest values start empty")
            if self.goes_on_with_other_data:
                self.logger.say(f" on another data plan than it was trained on, from sequence {self.consumed:,}")
        checkpoints = config.checkpoint
        self.saver = CheckpointSaver(
            Path(config.run_dir) / "checkpoints",
            asynchronous=checkpoints.async_save,
            keep_last=checkpoints.keep_last,
            keep_every=checkpoints.keep_every,
            max_failures=checkpoints.max_save_failures,
            say=self.logger.say,
        )
        if is_logger:
            (Path(config.run_dir) / "config.yaml").write_text(to_yaml(config))

    def _load(self, start: Start) -> None:
        if start.weights_only:
            self.missing = load_weights(start.checkpoint, self.model, pg_collection=self.groups)
            self.optimizer.reload_model_params()
            return
        same_data = self.data.plan.fingerprint(start.metadata.consumed_sequences) == start.metadata.plan_fingerprint
        if not same_data and not self.config.checkpoint.accept_other_data:
            raise UserError(
                f"{start.checkpoint} was trained on another data plan (sources, weights, packing or data.seed differ): "
                "restore data.* as in its config.yaml, go on all the same from the same number of sequences with "
                "--checkpoint.accept_other_data true, or start anew from its weights with --checkpoint.finetune true"
            )
        self.goes_on_with_other_data = not same_data
        self.without_scales = load_checkpoint(
            start.checkpoint, self.config, self.model, self.optimizer, self.scheduler, pg_collection=self.groups
        )
        self.iteration, self.consumed = start.metadata.iteration, start.metadata.consumed_sequences

    def train(self) -> None:
        """Step until `train_iters`, with validation, logs and checkpoints at their intervals."""
        training, last = self.config.training, self.config.training.train_iters
        window = Window(self.config)
        if training.eval_interval and self.iteration < last:
            self.validate()
        while self.iteration < last:
            rates = component_learning_rates(self.config, self.optimizer)  # of this step; the scheduler then moves on
            is_logged = self._is_due(self.config.logging.log_interval)
            statistics = self.step(window, with_component_norms=is_logged)
            self.saver.poll()
            self.logger.progress(loss=statistics.losses.loss, **{"tokens/s": window.tokens_per_second})
            if is_logged:
                figures = window.figures(self.iteration, self.consumed, statistics, rates)
                epochs = self.data.epochs(self.consumed)
                figures |= {f"epochs {name}": value for name, value in epochs.items()}
                figures |= routing_figures(self.config, self.model, pg_collection=self.groups)
                self.logger.record("train", self.iteration, figures)
                self.logger.say(console_line(figures, train_iters=last))
                window = Window(self.config, skipped=window.skipped, nan=window.nan)
            if training.eval_interval and (self.iteration % training.eval_interval == 0 or self.iteration == last):
                self.validate()
            save_interval = self.config.checkpoint.save_interval
            if self.iteration == last:
                self.saver.max_failures = 0  # nothing comes after it
            if self.iteration == last or (save_interval and self.iteration % save_interval == 0):
                self.save()
        self.pulse.enter("end", step=self.iteration)
        self.saver.wait()
        self.logger.close()

    def _is_due(self, interval: int) -> bool:
        """Whether something done every `interval` steps and after the last is due after the coming step."""
        coming = self.iteration + 1
        return coming % interval == 0 or coming == self.config.training.train_iters

    def step(self, window: Window, *, with_component_norms: bool) -> StepStatistics:
        """One optimizer step on the next global batch, counted in `window`."""
        self.pulse.enter("data", step=self.iteration + 1)
        started = time.perf_counter()
        microbatches = list(islice(self.batches, self.num_microbatches))
        waited = time.perf_counter() - started
        self.pulse.enter("step", step=self.iteration + 1)
        statistics = train_step(
            self.config,
            self.model,
            self.optimizer,
            self.scheduler,
            microbatches,
            pg_collection=self.groups,
            with_component_norms=with_component_norms,
        )
        seconds = time.perf_counter() - started
        images_per_rank = self.dealer.images_per_rank(self.consumed // self.config.training.global_batch_size)
        window.add(statistics, images_per_rank, seconds=seconds, waited=waited)
        self.iteration += 1
        self.consumed += self.config.training.global_batch_size
        return statistics

    def validate(self) -> None:
        self.pulse.enter("validation", step=self.iteration)
        losses = validate_model(self.config, self.model, self.held_out, pg_collection=self.groups)
        self.logger.record("validation", self.iteration, losses)
        text = " | ".join(f"{name}: {loss:.4f}" for name, loss in losses.items())
        self.logger.say(f" validation at iteration {self.iteration} | {text} |")

    def save(self) -> None:
        self.pulse.enter("checkpoint", step=self.iteration)
        metadata = CheckpointMetadata(
            iteration=self.iteration,
            consumed_sequences=self.consumed,
            config=to_dict(self.config),
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            plan_fingerprint=self.data.plan.fingerprint(self.consumed),
            wandb_run_id=self.logger.wandb_run_id,
            world_size=torch.distributed.get_world_size(),
        )
        self.saver.save(metadata, training_state(self.model, self.optimizer, self.scheduler, pg_collection=self.groups))
