"""`mm1 parity`: loads the same weights in every layout, runs the same batches, and compares everything with one
process.

Worker processes are started once per number of processes and run one layout after the other. Each holds one GPU where
there are any (NCCL), else a CPU thread (gloo).
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from megatron_mm1.config import MM1Config
from megatron_mm1.config.loading import load_config
from megatron_mm1.config.validation import validate
from megatron_mm1.errors import UserError
from megatron_mm1.parallel.device import layer_backend
from megatron_mm1.parity import jobs
from megatron_mm1.parity.batches import KINDS
from megatron_mm1.parity.layouts import Layout, choose_layouts
from megatron_mm1.parity.report import (
    FLOOR,
    HEADINGS,
    Bounds,
    Finding,
    LayoutResult,
    summary,
    write_report,
)
from megatron_mm1.parity.shards import norms_of, relative_errors
from megatron_mm1.parity.workers import Pool, WorkerError
from megatron_mm1.planning.fp8 import check_fp8_shapes

DEFAULTS = {
    "training.micro_batch_size": "2",
    "training.global_batch_size": "16",
    "training.precision": "fp32",
    "training.layer_backend": "local",
    "data.sources": "[]",
    "data.validation": "[]",
    "optimizer.clip_grad": "0.1",
}
"""Settings of the comparison that are not the preset's; options given by the user come after them. The gradient norm is
well above the limit, so that clipping takes part."""

FLOAT32 = Bounds()
ROUNDING = {"fp32": FLOAT32.rounding, "bf16": 4e-3}

TINY = 1e-30
"""Where nothing has a gradient (a frozen decoder and no image), there must be none."""


class Comparison:
    """Runs layouts of one model; a context manager, which ends the workers and removes what they wrote.

    Args:
        config: the model, the batch's shape and the precision; layouts set the rest.
        kinds: of batches, keys of KINDS.
        steps: gradient steps whose losses are compared.
        bounds: what passes.
        job, reference: what each rank of a layout and the one process run, for tests that change something first.
    """

    def __init__(
        self,
        config: MM1Config,
        *,
        kinds: Sequence[str] = tuple(KINDS),
        steps: int = 2,
        bounds: Bounds = FLOAT32,
        job: Callable[..., Any] = jobs.run_layout,
        reference: Callable[..., Any] = jobs.run_reference,
    ) -> None:
        self.config, self.kinds, self.steps, self.bounds = config, kinds, steps, bounds
        self.job, self.reference = job, reference
        self.backend = layer_backend(config)
        self._folder = tempfile.TemporaryDirectory(prefix="mm1-parity-")
        self._references: dict[str, tuple[Path, Path, dict[str, jobs.Outcome]]] = {}
        self._weights: dict[str, Path] = {}
        self._single: Pool | None = None

    def __enter__(self) -> "Comparison":
        return self

    def __exit__(self, *error: object) -> None:
        if self._single is not None:
            self._single.close()
        self._folder.cleanup()

    def run(self, layouts: Sequence[Layout]) -> Iterator[LayoutResult]:
        """Results as they come, layouts of the same number of processes together."""
        ordered = sorted(layouts, key=lambda layout: layout.world_size)
        for world_size, group in groupby(ordered, key=lambda layout: layout.world_size):
            pool = self._pool(world_size)
            try:
                for layout in group:
                    if not pool.alive:
                        pool = self._pool(world_size)
                    yield self.compare(layout, pool)
            finally:
                pool.close()

    def _pool(self, world_size: int) -> Pool:
        return Pool(world_size, timeout_minutes=self.config.parallel.distributed_timeout_minutes)

    def compare(self, layout: Layout, pool: Pool, *, kinds: Sequence[str] | None = None) -> LayoutResult:
        """One layout on the ranks of `pool`, with some of the kinds of batch or with all."""
        kinds = kinds or self.kinds
        started = time.perf_counter()
        config = layout.configure(self.config)

        def result(findings: tuple[Finding, ...] = (), failure: str | None = None) -> LayoutResult:
            seconds = time.perf_counter() - started
            return LayoutResult(layout.name, layout.world_size, layout.num_microbatches, seconds, findings, failure)

        try:
            validate(config, world_size=layout.world_size)
            check_fp8_shapes(config)
            checkpoint, folder, expected = self._reference(layout)
            ranks = pool.run(
                self.job, config, checkpoint, backend=self.backend, kinds=kinds, steps=self.steps, folder=folder
            )
        except (UserError, WorkerError) as error:
            return result(failure=str(error))
        return result(tuple(self._finding(kind, folder, ranks, expected[kind]) for kind in kinds))

    def _reference(self, layout: Layout) -> tuple[Path, Path, dict[str, jobs.Outcome]]:
        """(checkpoint, folder of the reference's tensors, its outcomes); computed when first asked for."""
        config = layout.reference(self.config)
        key = repr(config)
        if key not in self._references:
            if self._single is None or not self._single.alive:
                self._single = self._pool(1)
            folder = Path(self._folder.name) / str(len(self._references))
            folder.mkdir()
            model = repr(config.model)  # the weights depend on nothing else
            if model not in self._weights:
                [self._weights[model]] = self._single.run(
                    jobs.save_initial, config, folder / "weights", backend=self.backend
                )
            checkpoint = self._weights[model]
            [outcomes] = self._single.run(
                self.reference,
                config,
                checkpoint,
                backend=self.backend,
                kinds=self.kinds,
                steps=self.steps,
                folder=folder,
            )
            self._references[key] = checkpoint, folder, outcomes
        return self._references[key]

    def _finding(
        self, kind: str, folder: Path, ranks: Sequence[dict[str, jobs.Outcome]], expected: jobs.Outcome
    ) -> Finding:
        outcomes = [rank[kind] for rank in ranks]
        reference = {what: jobs.reference_tensors(folder, kind, what) for what in ("gradients", "weights")}
        initial = jobs.reference_tensors(folder, jobs.INITIAL, "weights")
        gradient_norms = norms_of(reference["gradients"])
        least = max(FLOOR * math.hypot(*gradient_norms.values()), TINY)
        gradients = relative_errors(
            [outcome.gradients for outcome in outcomes],
            reference["gradients"],
            scales={name: max(norm, least) for name, norm in gradient_norms.items()},
        )
        updates = norms_of({name: after - initial[name] for name, after in reference["weights"].items()})
        least_update = max(FLOOR * math.hypot(*updates.values()), TINY)
        weights = relative_errors(
            [outcome.weights for outcome in outcomes],
            reference["weights"],
            scales={
                name: max(updates[name], least_update, self.bounds.rounding / self.bounds.tensor * norm)
                for name, norm in norms_of(reference["weights"]).items()
            },
        )
        gradient_of = max(gradients, key=gradients.__getitem__)
        weight_of = max(weights, key=weights.__getitem__)
        return Finding(
            bounds=self.bounds,
            kind=kind,
            loss=max(
                _difference(ours, theirs)
                for outcome in outcomes
                for ours, theirs in zip(outcome.losses, expected.losses, strict=True)
            ),
            grad_norm=max(_difference(outcome.grad_norm, expected.grad_norm) for outcome in outcomes),
            gradient=gradients[gradient_of],
            gradient_of=gradient_of,
            weight=weights[weight_of],
            weight_of=weight_of,
            small=tuple(name for name, norm in gradient_norms.items() if norm < least),
        )


def _difference(ours: float, theirs: float) -> float:
    """Relative; infinite where one of them is not a number."""
    difference = abs(ours - theirs) / max(abs(theirs), 1e-30)
    return difference if difference == difference else float("inf")


def parity_config(arguments: Sequence[str]) -> MM1Config:
    """The configuration of a comparison: a preset's with DEFAULTS and the user's options."""
    given = [argument for argument in arguments if argument.startswith("--")]
    defaults = [text for key, value in DEFAULTS.items() if not _names(given, key) for text in (f"--{key}", value)]
    return load_config([*defaults, *arguments])


def _names(options: Sequence[str], key: str) -> bool:
    """Whether an option names the key, by its path or its last part."""
    names = {option[2:].partition("=")[0].replace("-", "_") for option in options}
    return key in names or key.rpartition(".")[2] in names


def parity_main(args: argparse.Namespace, config_arguments: Sequence[str]) -> bool:
    """Compare, print the table as it grows, write the report; whether all layouts passed.

    Raises:
        UserError: the configuration or a layout is not legal.
    """
    config = parity_config(config_arguments)
    kinds = tuple(KINDS) if args.batches == "all" else tuple(name.strip() for name in args.batches.split(","))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"no kind of batch {', '.join(map(repr, unknown))}: use all, or some of {', '.join(KINDS)}")
    world_size = args.world_size or torch.cuda.device_count() or 2
    layouts = choose_layouts(config, args.layouts, max_world_size=world_size)
    settings = [
        f"model {config.name}, sequences of {config.data.seq_length}, micro batch {config.training.micro_batch_size}, "
        f"precision {config.training.precision}, layer backend {layer_backend(config)}",
        f"{len(layouts)} layouts ({args.layouts}) of at most {world_size} processes, on {_device()}",
        f"{len(kinds)} kinds of batch: {', '.join(kinds)}",
    ]
    print("\n".join(settings), flush=True)
    widths = [max(len(HEADINGS[0]), *(len(layout.name) for layout in layouts)), 9, 6, 6, 64, 6, 22, 4]
    print(_line(HEADINGS, widths), flush=True)
    results = []
    bounds = Bounds(args.tolerance, rounding=ROUNDING[config.training.precision])
    with Comparison(config, kinds=kinds, steps=args.steps, bounds=bounds) as comparison:
        for result in comparison.run(layouts):
            results.append(result)
            print(_line(result.row(), widths), flush=True)
    write_report(args.output, results, settings=settings, bounds=bounds)
    print(f"{summary(results, bounds)}\nreport: {args.output}/parity.md, {args.output}/parity.json")
    return all(result.passed for result in results)


def _device() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, NCCL"
    return "CPU, gloo"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
