"""The tower under tensor parallelism: images shared out (`data`) against layers split (`tensor`), on two processes.

    OMP_NUM_THREADS=1 python benchmarks/vision_modes.py

Both modes have the same weights and images, and their image tokens and gradients must agree before anything is timed.
A sample is the vision work of a training step: forward and backward passes of tower and connector over its
microbatches, and the sum of gradients over the ranks that `data` mode needs once a step. The modes take turns in one
run (tensor, data, data, tensor, ..); the slower rank counts, and of the ratios of neighbours the median. Goal: `data`
mode is at least as fast, for the tower of mm1-tiny and for a larger one.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from goals import Goal, report
from torch import Tensor

import megatron_mm1.parallel  # noqa: F401  # before megatron-core is imported
from megatron_mm1.config import MM1Config, ParallelConfig
from megatron_mm1.config.presets import preset
from megatron_mm1.config.validation import validate
from megatron_mm1.parallel.groups import build_process_groups, destroy_process_groups
from megatron_mm1.parity.jobs import itself, main_grad
from megatron_mm1.parity.shards import Shard, shards, whole_tensors
from megatron_mm1.parity.workers import Pool
from megatron_mm1.training.build import build_model, unwrap

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

PROCESSES = 2
MICROBATCHES = 2
TOLERANCE = 1e-4
LEAST_PAIRS = 10


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time the two modes of vision work on two processes.")
    parser.add_argument("--pairs", type=int, default=20, metavar="N", help="pairs of steps timed (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=3, metavar="N", help="pairs before (%(default)s)")
    parser.add_argument("--images", type=int, default=16, metavar="N", help="in a microbatch (%(default)s)")
    args = parser.parse_args(argv)
    if args.pairs < LEAST_PAIRS or args.images < 1:
        parser.error(f"--pairs must be at least {LEAST_PAIRS}, --images at least 1")
    settings: dict[str, object] = {
        "processes": PROCESSES,
        "threads per process": 1,
        "step": f"{MICROBATCHES} microbatches of {args.images} images",
        "pairs": args.pairs,
    }
    goals = []
    pool = Pool(PROCESSES)
    try:
        for name, config in towers().items():
            ranks = pool.run(time_modes, config, images=args.images, pairs=args.warm_up + args.pairs)
            timed = slowest_rank([rank.seconds for rank in ranks])[args.warm_up :]
            settings[name] = describe(config, timed, error=max(rank.error for rank in ranks))
            goals.append(Goal(f"tensor_over_data_{name}", median_ratio(timed), "x", ">", 1.0))
    finally:
        pool.close()
    return report(settings, goals)


def towers() -> dict[str, MM1Config]:
    """Models whose towers are timed; the decoder, which does not run, is mm1-tiny's."""
    tiny = preset("mm1-tiny")
    large = replace(tiny.model.vision, image_size=96, hidden_size=256, ffn_hidden_size=1024)
    return {"mm1-tiny": tiny, "4x256_at_96px": replace(tiny, model=replace(tiny.model, vision=large))}


Pair = tuple[float, float]
"""Seconds of a step in `tensor` and in `data` mode."""


def slowest_rank(ranks: Sequence[Sequence[Pair]]) -> list[Pair]:
    """Each step takes as long as its slower rank."""
    return [
        (max(tensor for tensor, _ in of_pair), max(data for _, data in of_pair)) for of_pair in zip(*ranks, strict=True)
    ]


def median_ratio(pairs: Sequence[Pair]) -> float:
    return statistics.median(tensor / data for tensor, data in pairs)


def describe(config: MM1Config, pairs: Sequence[Pair], *, error: float) -> str:
    vision = config.model.vision
    tensor, data = (1000 * statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = sorted(tensor / data for tensor, data in pairs)
    return (
        f"{vision.num_layers} x {vision.hidden_size}, {vision.image_size} px; medians: tensor {tensor:.1f} ms, "
        f"data {data:.1f} ms; ratios of pairs {ratios[0]:.2f} to {ratios[-1]:.2f}; tokens and gradients agree to "
        f"{error:.0e}"
    )


@dataclass(frozen=True)
class Timed:
    """What one rank found: the relative difference of the modes' results, and (tensor, data) seconds of each pair."""

    error: float
    seconds: list[Pair]


def time_modes(config: MM1Config, *, images: int, pairs: int) -> Timed:
    """Runs on each rank.

    Raises:
        ArithmeticError: the modes disagree.
    """
    generator = torch.Generator().manual_seed(config.training.seed)
    side = config.model.vision.image_size
    shape = images, config.model.connector.tokens_per_image, config.model.decoder.hidden_size
    pixels = torch.randn(images, 3, side, side, generator=generator)
    gradient = torch.randn(shape, generator=generator)
    layout = ParallelConfig(tensor_model_parallel_size=PROCESSES)
    groups = build_process_groups(layout, seed=config.training.seed)
    tensor, data = (
        VisionWork(replace(config, parallel=replace(layout, vision_parallel_mode=mode)), pg_collection=groups)
        for mode in ("tensor", "data")
    )
    tensor.copy_weights(data)
    error = max(
        relative_difference(tensor.step(pixels, gradient), data.step(pixels, gradient)),
        tensor.gradient_difference(data),
    )
    if not error <= TOLERANCE:
        raise ArithmeticError(f"the modes differ by {error:.1e}, more than {TOLERANCE}: nothing was timed")
    seconds = []
    for number in range(pairs):
        order = (tensor, data) if number % 2 == 0 else (data, tensor)
        times = {work: work.timed_step(pixels, gradient) for work in order}
        seconds.append((times[tensor], times[data]))
    destroy_process_groups()
    return Timed(error, seconds)


class VisionWork:
    """Tower and connector of a tensor-parallel model in one mode, with gradient buffers as in training."""

    def __init__(self, config: MM1Config, *, pg_collection: "ProcessGroupCollection") -> None:
        validate(config, world_size=PROCESSES)
        self.groups = pg_collection
        self.model = build_model(config, backend="local", pg_collection=pg_collection)

    def step(self, pixels: Tensor, gradient: Tensor) -> Tensor:
        """The image tokens; leaves the gradients of the step in `main_grad`."""
        [chunk] = self.model
        chunk.zero_grad_buffer()
        for _ in range(MICROBATCHES):
            tokens = unwrap(chunk).encode(pixels)
            tokens.backward(gradient)
        unwrap(chunk).finalize_vision_gradients()
        return tokens.detach()

    def timed_step(self, pixels: Tensor, gradient: Tensor) -> float:
        torch.distributed.barrier()
        started = time.perf_counter()
        self.step(pixels, gradient)
        return time.perf_counter() - started

    def copy_weights(self, other: "VisionWork") -> None:
        """Take over this rank's part of the weights of `data` mode, which are whole on every rank."""
        whole = other.vision(itself)
        for part in self._shards(itself):
            part.data.copy_(part.of(whole[part.name]))

    def gradient_difference(self, other: "VisionWork") -> float:
        """Relative, of all gradients that this rank has; `other` in `data` mode."""
        whole = other.vision(main_grad)
        parts = [(part.data, part.of(whole[part.name])) for part in self._shards(main_grad)]
        ours, theirs = (torch.cat([pair[side].flatten() for pair in parts]) for side in (0, 1))
        return relative_difference(ours, theirs)

    def vision(self, value_of: Callable[[torch.nn.Parameter], Tensor]) -> dict[str, Tensor]:
        return whole_tensors(iter(self._shards(value_of)))

    def _shards(self, value_of: Callable[[torch.nn.Parameter], Tensor]) -> list[Shard]:
        found = shards(self.model, value_of, pg_collection=self.groups)
        return [part for part in found if part.name.split(".")[0] in ("tower", "connector")]


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Not a number where one of them holds one."""
    return float((ours - theirs).norm() / max(theirs.norm().item(), math.ulp(0)))


if __name__ == "__main__":
    sys.exit(main())
