"""What the workers of test_interruption.py run: the trainer, with a signal at a chosen moment."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_mm1.config import MM1Config
from megatron_mm1.data.tokenizer import open_tokenizer
from megatron_mm1.parallel.groups import build_process_groups, destroy_process_groups
from megatron_mm1.training import saving, trainer
from megatron_mm1.training.interruption import interruptible
from megatron_mm1.training.resume import starting_point


@contextmanager
def held_writer() -> Iterator[None]:
    """The thread that writes a checkpoint begins, and then waits until the block is over."""
    write, is_over = saving._Strategy.write, threading.Event()

    def held(strategy: saving._Strategy) -> list[Any]:
        is_over.wait()
        return write(strategy)

    saving._Strategy.write = held  # type: ignore[method-assign]
    try:
        yield
    finally:
        is_over.set()
        saving._Strategy.write = write  # type: ignore[method-assign]


class SignalledRun(trainer.Run):
    """Sends its own process a signal after a step's update, or while the checkpoint of that step is being written."""

    send: partial[None] | None = None
    step_of_signal = 0
    in_save = False

    def step(self, *args, **kwargs):
        statistics = super().step(*args, **kwargs)
        if not self.in_save:
            self._send()
        return statistics

    def save(self) -> None:
        if not self.in_save:
            return super().save()
        with held_writer():
            super().save()
            self._send()

    def _send(self) -> None:
        if self.send is not None and self.iteration == self.step_of_signal:
            self.send()


def train(
    config: MM1Config, *, rank: int | None = None, step: int = 0, in_save: bool = False, number: int = signal.SIGTERM
) -> tuple[int, int]:
    """(last step, number of checkpoints) of a run in which `rank` gets a signal at a step; None: nobody does."""
    groups = build_process_groups(config.parallel, seed=config.training.seed)
    tokenizer = open_tokenizer(config.data.tokenizer)
    start = starting_point(config, tokenizer)
    with interruptible() as interruption:
        interruption.connect()
        run = SignalledRun(
            config, backend="local", tokenizer=tokenizer, start=start, groups=groups, interruption=interruption
        )
        if rank == torch.distributed.get_rank():
            run.send, run.step_of_signal, run.in_save = partial(signal.raise_signal, number), step, in_save
        run.train()
    destroy_process_groups()
    return run.iteration, len(list(Path(config.run_dir, "checkpoints").glob("step-*")))
