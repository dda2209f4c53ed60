"""What the workers of test_anomalies run: the trainer, with steps that go wrong on purpose."""

import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from megatron_mm1.config import MM1Config
from megatron_mm1.data.tokenizer import open_tokenizer
from megatron_mm1.errors import UserError
from megatron_mm1.parallel.groups import build_process_groups, destroy_process_groups
from megatron_mm1.training import trainer
from megatron_mm1.training.build import unwrap
from megatron_mm1.training.resume import check_ranks_agree, starting_point
from megatron_mm1.training.step import LossStatistics, StepStatistics

NOT_A_STEP = StepStatistics(LossStatistics((0.0,), (0.0,)), 0.0, component_grad_norms=None, skipped=False)


class FaultyRun(trainer.Run):
    """A run whose global batches meet faults, by their number: a name of `FAULTS`, "absent" or "weights"."""

    def __init__(self, config: MM1Config, *, faults: Mapping[int, str], **options: Any) -> None:
        self.faults = dict(faults)
        super().__init__(config, **options)

    def step(self, window: Any, **options: Any) -> StepStatistics:
        fault = self.faults.get(self.progress.global_batch)
        if fault == "absent":
            window.steps, window.seconds = window.steps + 1, 1.0
            return self._no_step()
        if fault == "weights":  # broken by this step, once, in one place of one rank
            statistics = super().step(window, **options)
            del self.faults[self.progress.global_batch - 1]
            if torch.distributed.get_rank() == 0:
                next(self.progress.model[0].parameters()).data.view(-1)[0] = torch.nan
            return statistics
        with FAULTS[fault](self) if fault else no_fault(self):
            return super().step(window, **options)

    def _no_step(self) -> StepStatistics:
        """The batch is gone and the schedule has moved on; nothing was computed."""
        for _ in range(self.num_microbatches):
            next(self.batches)
        self.progress.scheduler.step(increment=self.config.training.global_batch_size)
        self.progress.advance()
        return NOT_A_STEP


@contextmanager
def no_fault(run: FaultyRun) -> Iterator[None]:
    yield


@contextmanager
def broken_images(run: FaultyRun) -> Iterator[None]:
    """On the last rank that encodes images."""
    stage = unwrap(run.progress.model[0])
    encode = stage.encode
    is_last = run.groups.dp.rank() == run.groups.dp.size() - 1
    stage.encode = lambda pixels: encode(pixels * torch.nan if is_last else pixels)
    try:
        yield
    finally:
        stage.encode = encode


@contextmanager
def changed_gradients(run: FaultyRun, change: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """`change` is applied to the first gradient of the last rank, before gradients are reduced."""
    config = unwrap(run.progress.model[0]).config
    finalize = config.finalize_model_grads_func

    def poisoned(*args: Any, **kwargs: Any) -> None:
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            change(next(run.progress.model[0].parameters()).main_grad)
        finalize(*args, **kwargs)

    config.finalize_model_grads_func = poisoned
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize


@contextmanager
def slow_images(run: FaultyRun) -> Iterator[None]:
    """On the last rank: its own work, for which the others wait in communication."""
    stage = unwrap(run.progress.model[0])
    encode = stage.encode

    def slow(pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(0.5)
        return encode(pixels)

    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        stage.encode = slow
    try:
        yield
    finally:
        stage.encode = encode


@contextmanager
def slow_data(run: FaultyRun) -> Iterator[None]:
    """On rank 0."""
    batches = run.batches

    def pause() -> Iterator[Any]:
        time.sleep(0.5)
        yield from ()

    if torch.distributed.get_rank() == 0:
        run.batches = itertools.chain(pause(), batches)
    try:
        yield
    finally:
        run.batches = batches


@contextmanager
def end_once_gone_back(run: FaultyRun) -> Iterator[None]:
    if run.guard.passed_over:
        raise UserError("ended on purpose")
    yield


@contextmanager
def dead_workers(run: FaultyRun) -> Iterator[None]:
    """Every loader process of this rank is killed."""
    workers = [process for process in multiprocessing.active_children() if process.name == "data-worker"]
    assert workers
    for worker in workers:
        worker.kill()
    yield


FAULTS: Mapping[str, Callable[[FaultyRun], Any]] = {
    "images": broken_images,
    "gradient": lambda run: changed_gradients(run, lambda gradient: gradient.view(-1)[:1].fill_(torch.nan)),
    "slow images": slow_images,
    "slow data": slow_data,
    "dead workers": dead_workers,
    "end once gone back": end_once_gone_back,
    "spike": lambda run: changed_gradients(run, lambda gradient: gradient.add_(1e6)),
}


def train(config: MM1Config, faults: Mapping[int, str]) -> str:
    """The trainer's own run, from its configuration to its last checkpoint; the error that ended it, if one did."""
    tokenizer = open_tokenizer(config.data.tokenizer)
    groups = build_process_groups(config.parallel, seed=config.training.seed)
    start = starting_point(config, tokenizer)
    check_ranks_agree(start)
    try:
        run = FaultyRun(config, faults=faults, backend="local", tokenizer=tokenizer, start=start, groups=groups)
        run.train()
        return ""
    except UserError as error:
        return str(error)
    finally:
        destroy_process_groups()
