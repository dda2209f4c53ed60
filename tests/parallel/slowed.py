"""Delays put into a training step, and what the workers of tests/parallel/test_bench.py run."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from time import sleep
from typing import Any
from unittest.mock import patch

import torch

from megatron_mm1.bench.instruments import instrumented
from megatron_mm1.bench.step import StepBench, repeated_batches
from megatron_mm1.config import MM1Config
from megatron_mm1.parallel.groups import build_process_groups, destroy_process_groups
from megatron_mm1.training.build import unwrap
from megatron_mm1.training.step import StepStatistics

SMALL = [
    *("--model.decoder.hidden_size", "64", "--model.decoder.ffn_hidden_size", "160", "--vocab_size", "512"),
    *("--model.vision.hidden_size", "64", "--model.vision.ffn_hidden_size", "128", "--model.vision.num_layers", "2"),
    *("--model.connector.hidden_size", "32", "--seq_length", "128"),
    *("--micro_batch_size", "1", "--global_batch_size", "2"),
]


class Delay:
    """Calls `wait` in the middle of things and counts how often."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        self.count = self.backward = 0
        self._patches = ExitStack()

    def __enter__(self) -> "Delay":
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()

    def __call__(self, gradient: torch.Tensor | None = None) -> None:
        self.count += 1
        self.backward += gradient is not None
        self.wait()

    def slow(self, *modules: torch.nn.Module) -> None:
        """At the end of each module's forward pass, and at the start of its backward pass where it has one."""
        for module in modules:
            module.register_forward_hook(self._after_forward)

    def _after_forward(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self()
        tensor = output[0] if isinstance(output, tuple) else output
        if tensor.requires_grad:
            tensor.register_hook(self)

    def patch(self, owner: Any, name: str) -> None:
        """In each call of a function, until the end of the `with` block."""
        function = getattr(owner, name)

        @wraps(function)
        def slow(*args: Any, **kwargs: Any) -> Any:
            self()
            return function(*args, **kwargs)

        self._patches.enter_context(patch.object(owner, name, slow))

    def after_each(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self()
            yield item


@contextmanager
def bench(config: MM1Config, *, kind: str = "two resolutions") -> Iterator[StepBench]:
    groups = build_process_groups(config.parallel, seed=config.training.seed)
    batches = repeated_batches(config, kind, dp_size=groups.dp.size())
    yield StepBench(config, batches, backend="local", pg_collection=groups)
    destroy_process_groups()


def take_apart_with_a_slow_rank(config: MM1Config, *, slow_rank: int, seconds: float) -> tuple[dict[str, float], float]:
    """This rank's parts of a step, and how long it was delayed: in both directions, the slow rank alone, in the tower
    or in a stage without one in its last layer.
    """
    delay = Delay(partial(sleep, seconds))
    with bench(config, kind="mixed") as measured:
        if torch.distributed.get_rank() == slow_rank:
            stages = map(unwrap, measured.model)
            stage = next(stage for stage in stages if stage.pre_process or stage.post_process)
            delay.slow(stage.tower.patch_embedding if stage.pre_process else stage.language_model.output_layer)
        _, parts = measured.take_apart(1, warmup=0)
    return parts, seconds * delay.count


def measure(config: MM1Config) -> dict[str, Any]:
    with bench(config) as measured:
        return measured.measure(measured.settings(), steps=2, warmup=1).record()


def step_with_and_without_instruments(config: MM1Config) -> tuple[list[StepStatistics], list[StepStatistics]]:
    with bench(config) as plain:
        expected = [plain.step() for _ in range(2)]
    with bench(config) as apart:
        instruments = instrumented(apart.model, apart.optimizer, apart.clock, pg_collection=apart.groups)
        with instruments, apart.clock.running():
            return expected, [apart.step() for _ in range(2)]
