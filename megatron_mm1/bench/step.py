"""`mm1 bench step`: the training step's speed as it is, then the same steps taken apart."""

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm1.bench.clock import DATA, Clock
from megatron_mm1.bench.instruments import instrumented
from megatron_mm1.bench.report import RankTimes, StepReport, write_report
from megatron_mm1.checkpoint.format import find_checkpoint
from megatron_mm1.config import MM1Config
from megatron_mm1.config.loading import load_config
from megatron_mm1.config.validation import validate
from megatron_mm1.data.batch import PackedBatch
from megatron_mm1.data.loader import train_batches
from megatron_mm1.data.tokenizer import Tokenizer, open_tokenizer
from megatron_mm1.errors import UserError
from megatron_mm1.parallel.device import layer_backend
from megatron_mm1.parallel.groups import (
    build_process_groups,
    destroy_process_groups,
    initialize_process_group,
    launcher_ranks,
)
from megatron_mm1.parity.batches import KINDS, synthetic_batches
from megatron_mm1.planning.flops import step_flops
from megatron_mm1.planning.fp8 import check_fp8_shapes
from megatron_mm1.training.build import build_model, build_optimizer
from megatron_mm1.training.checkpointing import load_weights
from megatron_mm1.training.figures import trainable_parameters
from megatron_mm1.training.step import StepStatistics, train_step

NO_IMAGE = "no image"


def bench_step_main(args: argparse.Namespace, config_arguments: Sequence[str]) -> None:
    """Measure, print, write the report.

    Raises:
        UserError: the configuration or its data does not allow training.
    """
    config = load_config(config_arguments)
    check_kind(config, args.synthetic)
    validate(config, world_size=launcher_ranks()[1])
    check_fp8_shapes(config)
    backend = layer_backend(config)
    tokenizer = None if args.synthetic else open_tokenizer(config.data.tokenizer)
    initialize_process_group(timeout_minutes=config.parallel.distributed_timeout_minutes)
    try:
        groups = build_process_groups(config.parallel, seed=config.training.seed)
        is_first = torch.distributed.get_rank() == 0
        if tokenizer is None:
            batches = repeated_batches(config, args.synthetic, dp_size=groups.dp.size())
        else:
            batches = loaded_batches(config, tokenizer, pg_collection=groups)
        bench = StepBench(config, batches, backend=backend, pg_collection=groups)
        settings = bench.settings() | {"data": args.synthetic or "loader", "steps": args.steps}
        if is_first:
            print("\n".join(f"{name}: {value}" for name, value in settings.items()), flush=True)
        report = bench.measure(settings, steps=args.steps, warmup=args.warmup)
        if is_first:
            print(f"\n{report.table()}")
            print(f"\nreport: {write_report(report, args.output)}")
        destroy_process_groups()
    finally:
        torch.distributed.destroy_process_group()


def check_kind(config: MM1Config, kind: str | None) -> None:
    """Refuse synthetic batches that do not exist or that the configuration does not allow.

    Raises:
        UserError: saying which there are.
    """
    if kind is not None and kind not in KINDS:
        raise UserError(f"no kind of batch {kind!r}: --synthetic takes one of {', '.join(KINDS)}")
    if kind not in (None, NO_IMAGE) and config.data.text_only:
        raise UserError(f"data.text_only leaves images out, which --synthetic {kind} has: use --synthetic '{NO_IMAGE}'")


def loaded_batches(
    config: MM1Config, tokenizer: Tokenizer, *, pg_collection: ProcessGroupCollection
) -> Iterator[PackedBatch]:
    """This rank's microbatches as training gets them."""
    dp, pp = pg_collection.dp, pg_collection.pp
    return train_batches(
        config,
        tokenizer=tokenizer,
        dp_rank=dp.rank(),
        dp_size=dp.size(),
        with_pixels=pp.rank() == 0,
    )


def repeated_batches(config: MM1Config, kind: str, *, dp_size: int) -> Iterator[PackedBatch]:
    """Microbatches without a corpus: those of one step, the same on all data-parallel ranks, over and over.

    Args:
        kind: one of `parity.batches.KINDS`.
    """
    share = replace(config.training, global_batch_size=config.training.global_batch_size // dp_size)
    yield from itertools.cycle(synthetic_batches(replace(config, training=share), kind))


class StepBench:
    """Model and optimizer as in training, on this rank; every rank makes the same calls.

    Args:
        batches: this rank's microbatches, without end.
    """

    def __init__(
        self,
        config: MM1Config,
        batches: Iterator[PackedBatch],
        *,
        backend: str,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        self.config, self.batches, self.backend, self.groups = config, batches, backend, pg_collection
        self.model = build_model(config, backend=backend, pg_collection=pg_collection)
        self.optimizer, self.scheduler = build_optimizer(config, self.model, pg_collection=pg_collection)
        if config.checkpoint.load is not None:  # a router that has learned balances its experts
            load_weights(find_checkpoint(config.checkpoint.load), self.model, pg_collection=pg_collection)
            self.optimizer.reload_model_params()
        self.clock = Clock(wait_for_computation)
        training = config.training
        self.num_microbatches = training.global_batch_size // (training.micro_batch_size * pg_collection.dp.size())
        self.images = 0
        self.waited = 0.0

    def step(self) -> StepStatistics:
        """One optimizer step on the next global batch."""
        started = time.perf_counter()
        with self.clock.region(DATA):
            microbatches = list(itertools.islice(self.batches, self.num_microbatches))
        self.waited += time.perf_counter() - started
        self.images += sum(batch.num_images for batch in microbatches)
        return train_step(
            self.config, self.model, self.optimizer, self.scheduler, microbatches, pg_collection=self.groups
        )

    def measure(self, settings: dict[str, Any], *, steps: int, warmup: int) -> StepReport:
        """`warmup` steps that do not count, `steps` as in training, and as many taken apart."""
        self._run(warmup)
        self.images, self.waited = 0, 0.0
        seconds = self._run(steps)
        images, waited = self.images / steps, self.waited / steps
        apart, parts = self.take_apart(steps)
        return self._report(settings, RankTimes(tuple(seconds), waited, apart, parts), images)

    def take_apart(self, steps: int, *, warmup: int = 1) -> tuple[float, dict[str, float]]:
        """Mean seconds of instrumented steps, whole and by part; `warmup` before them do not count."""
        with instrumented(self.model, self.optimizer, self.clock, pg_collection=self.groups):
            self._run(warmup)
            before = dict(self.clock.seconds)
            apart = self._run(steps, is_clocked=True)
        return fmean(apart), {part: (total - before[part]) / steps for part, total in self.clock.seconds.items()}

    def _run(self, steps: int, *, is_clocked: bool = False) -> list[float]:
        """Seconds of each step. As in training, nothing waits for the device between them, but before and after."""
        torch.cuda.synchronize()
        torch.distributed.barrier()
        seconds = []
        started = time.perf_counter()
        for number in range(steps):
            with self.clock.running() if is_clocked else nullcontext():
                self.step()
            if number == steps - 1:
                torch.cuda.synchronize()
            now = time.perf_counter()
            seconds.append(now - started)
            started = now
        return seconds

    def _report(self, settings: dict[str, Any], times: RankTimes, images: float) -> StepReport:
        world_size, training = torch.distributed.get_world_size(), self.config.training
        ranks: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(ranks, times)
        counts: list[Any] = [None] * self.groups.dp.size()
        torch.distributed.all_gather_object(counts, images, group=self.groups.dp)
        seq_length, sequences = self.config.data.seq_length, training.global_batch_size
        flops = step_flops(self.config.model, seq_length=seq_length, num_sequences=sequences, num_images=sum(counts))
        return StepReport(
            settings=settings,
            ranks=tuple(ranks),
            positions=sequences * seq_length,
            images=sum(counts),
            flops_per_device=flops / world_size,
        )

    def settings(self) -> dict[str, Any]:
        """What is measured, where; every rank calls it."""
        config, training = self.config, self.config.training
        on_gpu = torch.cuda.is_available()
        counts = trainable_parameters(self.model, groups=self.groups)
        return {
            "model": config.name,
            "layout": layout_line(config, dp_size=self.groups.dp.size()),
            "trainable parameters": ", ".join(f"{name} {count:,}" for name, count in counts.items()),
            "sequence length": config.data.seq_length,
            "batch": f"{training.global_batch_size} sequences, {self.num_microbatches} microbatches of "
            f"{training.micro_batch_size} on each data-parallel rank",
            "precision": training.precision,
            "layer backend": self.backend,
            "device": torch.cuda.get_device_name() if on_gpu else "CPU",
            "communication": torch.distributed.get_backend(),
            "torch threads per process": torch.get_num_threads(),
            "torch": torch.__version__,
        }


def wait_for_computation() -> None:
    """Waits for this stream, not for the device: a message still to come may depend on what this rank does next."""
    torch.cuda.current_stream().synchronize()


def layout_line(config: MM1Config, *, dp_size: int) -> str:
    """The parallel layout in words."""
    parallel = config.parallel
    sizes = {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "virtual pipeline": parallel.virtual_pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
        "expert": parallel.expert_model_parallel_size,
        "expert tensor": parallel.expert_tensor_parallel_size or 1,
        "data": dp_size,
    }
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    words += ["sequence parallel"] if parallel.sequence_parallel else []
    words += ["distributed optimizer"] if parallel.use_distributed_optimizer else []
    words += ["gradients reduced meanwhile"] if parallel.overlap_grad_reduce else []
    if parallel.tensor_model_parallel_size * parallel.context_parallel_size > 1:
        words += [f"vision by {parallel.vision_parallel_mode}"]
    processes = torch.distributed.get_world_size()
    return f"{processes} process{'es' if processes > 1 else ''}{': ' if words else ''}{', '.join(words)}"
