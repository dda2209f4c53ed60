"""Training speed on one H100: slices of the presets, in bf16 and in every FP8 recipe, beside a plain torch model.

    python benchmarks/gpu.py                 all slices, at most 16 minutes
    python benchmarks/gpu.py --dry-run       no GPU: shapes, parameters, FLOPs and memory, and the table without figures

Each variant of each slice runs in a process of its own, in order of importance, so that one that fails or hangs costs
the others nothing. What is measured, all of it as the median over steps with the clocks as they are: a whole training
step, the decoder alone and the tower alone (model TFLOP/s, and MFU over the published dense BF16 peak of an H100 SXM
also in FP8), the step beside the rate of large matrix products in the same process, peak memory beside the estimate,
device time by kind of kernel, and how often the host waits for the device in a step. Records are written as they come;
at the end, a card per preset. The exit code is 0 only if all goals hold.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from goals import report
from gpu_dry_run import dry_run
from gpu_measure import measure_into
from gpu_results import Record, card, goals_of, machine, table, write_cards, write_json
from gpu_slices import DEFAULT_SLICES, VARIANTS, Slice, Variant, cut, jobs

from megatron_mm1.config.presets import PRESETS
from megatron_mm1.errors import UserError

CARDS = Path(__file__).parent / "cards"
LONGEST_VARIANT = 180.0
SHORTEST_VARIANT = 60.0
"""Seconds: a variant that takes longer is ended; with less time left, none is begun. On an H200 one took 55 s."""


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        if args.measure is not None:
            measure_into(
                args.output,
                preset=args.slice[0],
                variant=args.measure,
                microbatches=args.microbatches,
                steps=args.steps,
                warm_up=args.warm_up,
            )
            return 0
        slices = [cut(name, microbatches=args.microbatches) for name in args.slice or DEFAULT_SLICES]
        variants = [VARIANTS[name] for name in args.variant or VARIANTS]
        if args.dry_run:
            return dry_run(slices, variants)
        return benchmark(slices, variants, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time slices of the presets on one GPU.")
    parser.add_argument("--dry-run", action="store_true", help="check every slice and variant without a GPU")
    parser.add_argument("--slice", action="append", choices=PRESETS, help="a preset (default: the three of the cards)")
    parser.add_argument("--variant", action="append", choices=tuple(VARIANTS), help="one variant (default: all)")
    parser.add_argument("--minutes", type=float, default=16.0, metavar="M", help="time for all of it (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps timed (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=3, metavar="N", help="steps before them (%(default)s)")
    parser.add_argument("--microbatches", type=int, default=4, metavar="N", help="sequences of a step (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench-gpu"), help="where JSON goes (%(default)s)")
    parser.add_argument("--cards", type=Path, default=CARDS, help="where cards go (%(default)s)")
    parser.add_argument("--measure", choices=tuple(VARIANTS), help=argparse.SUPPRESS)  # the process of one variant
    args = parser.parse_args(argv)
    if min(args.steps, args.warm_up, args.microbatches) < 1 or args.minutes <= 0:
        parser.error("--steps, --warm-up and --microbatches must be at least 1, and --minutes more than 0")
    return args


def benchmark(slices: Sequence[Slice], variants: Sequence[Variant], args: argparse.Namespace) -> int:
    """Measure everything that time allows; the exit code.

    Raises:
        UserError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("no CUDA device here: run it on a machine with one H100, or check all it would do by --dry-run")
    args.output.mkdir(parents=True, exist_ok=True)
    options = {"minutes": args.minutes, "steps": args.steps, "warm_up": args.warm_up}
    found = machine()
    rows: list[tuple[Slice, Variant, Record]] = []
    deadline = time.monotonic() + 60 * args.minutes
    for piece, variant in jobs(slices, variants):
        record = run_variant(piece, variant, args, seconds=min(LONGEST_VARIANT, deadline - time.monotonic()))
        rows.append((piece, variant, record))
        print(f"{piece.preset} {variant.name}: {record['status']} {record.get('error', '')}".rstrip(), flush=True)
        cards = [
            card(cut_, [(v, r) for p, v, r in rows if p is cut_], machine=found, options=options)
            for cut_ in slices
            if any(p is cut_ for p, _, _ in rows)
        ]
        write_json(args.output / "gpu.json", cards)
    files = write_cards(args.cards, cards)
    print(f"\n{table(rows)}\n")
    settings = {**found["device"], **options, "cards": ", ".join(map(str, files))}
    return report(settings, goals_of(rows))


def run_variant(piece: Slice, variant: Variant, args: argparse.Namespace, *, seconds: float) -> dict[str, Any]:
    """The record of one variant, measured in a process that is ended after so many seconds."""
    record: dict[str, Any] = {"slice": piece.preset, "variant": variant.name, "status": "not run"}
    if seconds < SHORTEST_VARIANT:
        return record | {"error": f"--minutes {args.minutes} were over"}
    file = args.output / f"{piece.preset}-{variant.name}.json"
    write_json(file, record)
    command = [sys.executable, __file__, "--measure", variant.name, "--slice", piece.preset, "--output", str(file)]
    command += ["--microbatches", str(args.microbatches), "--steps", str(args.steps), "--warm-up", str(args.warm_up)]
    # Slices fill the card, and the allocator's default blocks of fixed size would leave gaps.
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ
    problem = None
    with file.with_suffix(".log").open("w") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=seconds).returncode
            problem = f"its process ended with {code}: see {log.name}" if code else None
        except subprocess.TimeoutExpired:
            problem = f"it was not done after {seconds:.0f} s"
    record = json.loads(file.read_text())
    return record if problem is None else record | {"status": "failed", "error": problem}


if __name__ == "__main__":
    sys.exit(main())
