"""The trainer: everything a run does, from top to bottom."""

import time
from collections.abc import Generator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm1.checkpoint.format import CheckpointMetadata
from megatron_mm1.config import MM1Config
from megatron_mm1.config.serialization import to_yaml
from megatron_mm1.config.validation import validate
from megatron_mm1.data.balance import Dealer
from megatron_mm1.data.batch import PackedBatch
from megatron_mm1.data.loader import train_batches, validation_batches
from megatron_mm1.data.plan import training_data
from megatron_mm1.data.tokenizer import Tokenizer, open_tokenizer
from megatron_mm1.errors import UserError
from megatron_mm1.faults.stacks import stacks_on_signal
from megatron_mm1.faults.watch import Pulse, watched
from megatron_mm1.parallel.device import layer_backend
from megatron_mm1.parallel.groups import (
    build_process_groups,
    destroy_process_groups,
    initialize_process_group,
    launcher_ranks,
)
from megatron_mm1.planning.fp8 import check_fp8_shapes
from megatron_mm1.planning.memory import check_memory
from megatron_mm1.training.build import component_learning_rates
from megatron_mm1.training.figures import Window, introduction
from megatron_mm1.training.freezing import frozen_components
from megatron_mm1.training.guard import Guard
from megatron_mm1.training.interruption import Interruption, interruptible
from megatron_mm1.training.lag import LagMeter
from megatron_mm1.training.live import LiveEvaluation
from megatron_mm1.training.logging import RunLogger, console_line
from megatron_mm1.training.memory import MemoryWatch, described
from megatron_mm1.training.progress import Progress
from megatron_mm1.training.recovery import end_run, roll_back
from megatron_mm1.training.resume import Start, check_ranks_agree, starting_point
from megatron_mm1.training.routing import routing_figures
from megatron_mm1.training.saving import CheckpointSaver
from megatron_mm1.training.step import StepStatistics, pass_over, train_step
from megatron_mm1.training.validation import validate_model


def train(config: MM1Config, *, evaluation: LiveEvaluation | None = None) -> bool:
    """Train as `config` says: from scratch, from `checkpoint.load`, or on from this run's newest checkpoint.

    Args:
        evaluation: what is called every `evaluation.interval` steps.

    Returns:
        Whether it came to its last step; False: a signal ended it earlier, with a checkpoint to go on from.

    Raises:
        UserError: the configuration, the data or the checkpoint does not allow the run, and nothing has been written;
            or `faults` has ended it.
    """
    if config.evaluation.interval and evaluation is None:
        raise UserError("evaluation.interval is set, and this run was started without an evaluation: use mm1 train")
    validate(config, world_size=launcher_ranks()[1])
    check_fp8_shapes(config)
    check_memory(config, world_size=launcher_ranks()[1])
    backend = layer_backend(config)
    tokenizer = open_tokenizer(config.data.tokenizer)
    start = starting_point(config, tokenizer)

    parallel, stacks = config.parallel, Path(config.run_dir) / "stacks"
    store = initialize_process_group(timeout_minutes=parallel.distributed_timeout_minutes)
    try:
        rank = torch.distributed.get_rank()
        with (
            interruptible() as interruption,
            watched(
                store,
                rank=rank,
                world_size=torch.distributed.get_world_size(),
                silence_limit=parallel.heartbeat_timeout_seconds,
                # A little before the collectives give up: NCCL's watchdog aborts a process that may not be to blame.
                standstill_limit=config.faults.hang_timeout_seconds or 60 * parallel.distributed_timeout_minutes - 5,
                stacks=stacks,
            ) as pulse,
        ):
            check_ranks_agree(start)
            groups = build_process_groups(parallel, seed=config.training.seed)
            interruption.connect()
            run = Run(
                config,
                backend=backend,
                tokenizer=tokenizer,
                start=start,
                groups=groups,
                pulse=pulse,
                interruption=interruption,
            )
            with stacks_on_signal(stacks, rank):
                run.train(evaluation)
            torch.distributed.barrier()
        destroy_process_groups()
        return run.iteration >= config.training.train_iters
    finally:
        torch.distributed.destroy_process_group()


class Run:
    """One run on this rank: what it is made of, and its loop."""

    def __init__(
        self,
        config: MM1Config,
        *,
        backend: str,
        tokenizer: Tokenizer,
        start: Start | None,
        groups: ProcessGroupCollection,
        pulse: Pulse | None = None,
        interruption: Interruption | None = None,
    ) -> None:
        self.config, self.tokenizer, self.groups = config, tokenizer, groups
        self.pulse = pulse or Pulse(torch.distributed.get_rank())
        self.interruption = interruption or Interruption()
        self.data = training_data(config, tokenizer=tokenizer)
        encodes = groups.pp.rank() == 0
        place = {"dp_rank": groups.dp.rank(), "dp_size": groups.dp.size(), "with_pixels": encodes}
        self.held_out = validation_batches(config, tokenizer=tokenizer, **place)

        self.progress = Progress(config, backend=backend, data=self.data, pg_collection=groups)
        if start is not None:
            self.progress.load(start)

        self._open_batches = partial(train_batches, config, tokenizer=tokenizer, data=self.data, **place)
        self.batches: Generator[PackedBatch] = self._open_batches(consumed_sequences=self.progress.consumed)
        self.dealer = Dealer.of(config, self.data.plan, dp_size=groups.dp.size())
        is_logger = torch.distributed.get_rank() == 0
        wandb_run_id = None if start is None or start.weights_only else start.metadata.wandb_run_id
        self.logger = RunLogger(config, iteration=self.iteration, enabled=is_logger, wandb_run_id=wandb_run_id)
        for line in introduction(config, self.progress.model, backend=backend, groups=groups):
            self.logger.say(line)
        self.memory = MemoryWatch(config, pg_collection=groups)
        for line in self.memory.introduction():
            self.logger.say(line)
        for sentence in self.data.long_documents():
            self.logger.say(f" {sentence}")
        if start is not None:
            self.logger.say(f" starting from {start.checkpoint}")
            if (last := config.training.train_iters) <= self.iteration:
                self.logger.say(f" which is step {self.iteration:,} of {last:,}: nothing is left to train")
            if self.progress.missing:
                self.logger.say(f" not in it, and so drawn anew: {', '.join(self.progress.missing)}")
            if self.progress.without_scales:
                parts = ", ".join(self.progress.without_scales)
                self.logger.say(f" without FP8 scales of: {parts}; their histories of largest values start empty")
            for change in start.changes:
                self.logger.say(f" {change} from step {self.iteration + 1:,} on")
            if self.progress.has_other_data:
                consumed = self.progress.consumed
                self.logger.say(f" on another data plan than it was trained on, from sequence {consumed:,}")
        checkpoints = config.checkpoint
        self.saver = CheckpointSaver(
            Path(config.run_dir) / "checkpoints",
            asynchronous=checkpoints.async_save,
            keep_last=checkpoints.keep_last,
            keep_every=checkpoints.keep_every,
            max_failures=checkpoints.max_save_failures,
            say=self.logger.say,
        )
        norms = () if start is None or start.weights_only else start.metadata.grad_norms
        self.guard = Guard(config, self.data, say=self.logger.say, norms=norms)
        if self.guard.passed_over:
            self.logger.say(f" global batches that a rollback leaves out: {sorted(self.guard.passed_over)}")
        self.lag = LagMeter(self.pulse.status.who, factor=config.faults.straggler_factor, pg_collection=groups)
        if is_logger:
            (Path(config.run_dir) / "config.yaml").write_text(to_yaml(config))

    @property
    def iteration(self) -> int:
        """Optimizer steps taken."""
        return self.progress.iteration

    def train(self, evaluation: LiveEvaluation | None = None) -> None:
        """Step until `train_iters` or an interruption, with validation, `evaluation`, logs and checkpoints at their
        intervals.
        """
        training, last = self.config.training, self.config.training.train_iters
        window = Window(self.config)
        if training.eval_interval and self.iteration < last:
            self.validate()
        if evaluation is not None and self.iteration < last:
            self.evaluate(evaluation)
        ends = self.iteration >= last
        while not ends:
            self.interruption.begin()
            rates = self.learning_rates()  # of this step; the scheduler then moves on
            is_logged = self._is_due(self.config.logging.log_interval)
            statistics = self.step(window, is_logged=is_logged)
            is_interrupted = self.interruption.agreed()
            if statistics.skipped and self._goes_back(statistics):
                window = Window(self.config, skipped=window.skipped, nan=window.nan)
                ends = is_interrupted  # with the checkpoint gone back to
                continue
            self.saver.poll()
            if memory := self.memory.step():
                self.logger.record("memory", self.iteration, memory)
                self.logger.say(described(memory))
            self.logger.progress(loss=statistics.losses.loss, **{"tokens/s": window.tokens_per_second})
            if is_logged:
                self._log(window, statistics, rates)
                window = Window(self.config, skipped=window.skipped, nan=window.nan)
            ends = is_interrupted or self.iteration == last
            if self._is_looked_at(training.eval_interval, ends=ends):
                self.validate()
            if evaluation is not None and self._is_looked_at(self.config.evaluation.interval, ends=ends):
                self.evaluate(evaluation)
            if ends:
                self.saver.max_failures = 0  # nothing comes after it
            if ends or self._is_multiple(self.config.checkpoint.save_interval):
                self.save()
        self.pulse.enter("end", step=self.iteration)
        self.saver.wait()
        if self.iteration < last:
            self.logger.say(f" interrupted by a signal: ending after iteration {self.iteration}, which is saved")
        self.logger.close()

    def learning_rates(self) -> dict[str, float]:
        """Of the coming step, by component; 0 for those that do not train yet."""
        frozen = frozen_components(self.config.training, consumed_sequences=self.progress.consumed)
        return component_learning_rates(self.config, self.progress.optimizer) | dict.fromkeys(frozen, 0.0)

    def _is_due(self, interval: int) -> bool:
        """Whether something done every `interval` steps and after the last is due after the coming step."""
        coming = self.iteration + 1
        return coming % interval == 0 or coming == self.config.training.train_iters

    def _is_multiple(self, interval: int) -> bool:
        return bool(interval) and self.iteration % interval == 0

    def _is_looked_at(self, interval: int, *, ends: bool) -> bool:
        """Whether the model is to be judged now: every `interval` steps, but not before ending for a signal."""
        is_last = self.iteration == self.config.training.train_iters
        return bool(interval) and (is_last or (not ends and self._is_multiple(interval)))

    def _log(self, window: Window, statistics: StepStatistics, rates: Mapping[str, float]) -> None:
        """The figures of the steps since the last ones, and the ranks that lagged behind in this step."""
        figures = window.figures(self.iteration, self.progress.consumed, statistics, rates)
        epochs = self.data.epochs(self.progress.consumed)
        figures |= {f"epochs {name}": value for name, value in epochs.items()}
        figures |= routing_figures(self.config, self.progress.model, pg_collection=self.groups)
        self.logger.record("train", self.iteration, figures)
        self.logger.say(console_line(figures, train_iters=self.config.training.train_iters))
        for straggler in self.lag.stragglers():
            self.logger.record("straggler", self.iteration, asdict(straggler.work) | {"median": straggler.median})
            self.logger.say(f" {straggler}")

    def step(self, window: Window, *, is_logged: bool) -> StepStatistics:
        """One optimizer step on the next global batch, counted in `window`."""
        global_batch = self.progress.global_batch
        self.pulse.enter("data", step=self.iteration + 1)
        started = time.perf_counter()
        sequences = self.progress.batch_sizes.at(global_batch)
        with self.lag.measuring(is_logged and self.pulse.status.settled):  # not while kernels compile
            microbatches = list(islice(self.batches, self._num_microbatches(sequences)))
            waited = time.perf_counter() - started
            self.pulse.enter("step", step=self.iteration + 1)
            statistics = self._update(microbatches, is_logged=is_logged)
        seconds = time.perf_counter() - started
        images_per_rank = self.dealer.images_per_rank(global_batch)
        window.add(statistics, images_per_rank, sequences=sequences, seconds=seconds, waited=waited)
        self.progress.advance()
        return statistics

    def _update(self, microbatches: list[PackedBatch], *, is_logged: bool) -> StepStatistics:
        progress = self.progress
        if progress.global_batch in self.guard.passed_over:
            return pass_over(self.config, progress.scheduler)
        return train_step(
            self.config,
            progress.model,
            progress.optimizer,
            progress.scheduler,
            microbatches,
            pg_collection=self.groups,
            with_component_norms=is_logged,
            accept=self.guard.accept,
        )

    def _goes_back(self, statistics: StepStatistics) -> bool:
        """After a step that was not applied: do as `faults` says; whether the run has gone back.

        Raises:
            UserError: the run ends here.
        """
        done = self.progress.global_batch - 1
        if done in self.guard.passed_over:
            return False
        response = self.guard.respond(statistics.losses, iteration=self.iteration, global_batch=done)
        if response.action == "skip":
            return False
        self.pulse.enter("checkpoint", step=self.iteration)
        if response.checkpoint is None:
            end_run(self.progress, self._metadata(), why=response.what, saver=self.saver)
        metadata = roll_back(self.progress, response.checkpoint, saver=self.saver)
        self.guard.go_on(metadata.grad_norms)
        self.batches.close()
        self.batches = self._open_batches(consumed_sequences=self.progress.consumed)
        self.logger.go_back(self.iteration)
        return True

    def _num_microbatches(self, sequences: int) -> int:
        """Of this rank in a global batch of so many sequences."""
        return sequences // (self.config.training.micro_batch_size * self.groups.dp.size())

    def validate(self) -> None:
        self.pulse.enter("validation", step=self.iteration)
        losses = validate_model(self.config, self.progress.model, self.held_out, pg_collection=self.groups)
        self.logger.record("validation", self.iteration, losses)
        text = " | ".join(f"{name}: {loss:.4f}" for name, loss in losses.items())
        self.logger.say(f" validation at iteration {self.iteration} | {text} |")

    def evaluate(self, evaluation: LiveEvaluation) -> None:
        def moves() -> None:
            self.pulse.enter("evaluation", step=self.iteration)

        moves()
        figures = evaluation(self.progress.model, pg_collection=self.groups, moves=moves)
        self.logger.record("evaluation", self.iteration, figures)
        text = " | ".join(f"{name}: {value:.4f}" for name, value in figures.items())
        self.logger.say(f" evaluation at iteration {self.iteration} | {text} |")

    def save(self) -> None:
        self.pulse.enter("checkpoint", step=self.iteration)
        self.saver.save(self._metadata(), self.progress.state())

    def _metadata(self) -> CheckpointMetadata:
        return self.progress.metadata(
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            wandb_run_id=self.logger.wandb_run_id,
            grad_norms=self.guard.norms,
        )
