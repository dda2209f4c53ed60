"""Tables for the terminal: the presets' sizes beside the paper's, what of a step is in FP8, and its memory."""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields

from megatron_mm1.config.laws import PUBLISHED_SIZES
from megatron_mm1.config.presets import PRESETS, preset
from megatron_mm1.planning.fp8 import assess, fp8_share
from megatron_mm1.planning.gemms import Gemm
from megatron_mm1.planning.memory import GIB, RankMemory
from megatron_mm1.planning.parameters import count_parameters


def presets_table() -> str:
    """One line per preset: computed parameter counts and the published size."""
    rows: list[tuple[str, ...]] = [("preset", "decoder", "vision", "connector", "total", "active", "paper")]
    for name in PRESETS:
        counts = count_parameters(preset(name).model)
        numbers = (counts.non_embedding, counts.vision, counts.connector, counts.total, counts.active)
        size, what = PUBLISHED_SIZES.get(name, (None, ""))
        paper = "" if size is None else f"{human(size)} {what}"
        rows.append((name, *map(human, numbers), paper))
    return "\n".join(
        [*_aligned(rows), "", "decoder: without embedding and output layer; active: what one token passes through."]
    )


def gemm_table(gemms: Sequence[Gemm], *, precision: str) -> str:
    """One line per linear layer: shape on a rank, recipe and verdict.

    Args:
        precision: of what is not in FP8.
    """
    rows: list[tuple[str, ...]] = [
        ("component", "product", "times", "M", "padded M", "N", "K", "recipe", "verdict", "waste", "note")
    ]
    for gemm in gemms:
        verdict, in_fp8 = assess(gemm), gemm.recipe != "bf16"
        padded = gemm.padded_m > gemm.m
        rows.append(
            (
                gemm.component,
                gemm.name,
                f"{gemm.blocks} x {gemm.per_block}" if gemm.per_block > 1 else str(gemm.blocks),
                _rows(gemm.m),
                _rows(gemm.padded_m) if padded else "",
                str(gemm.n),
                str(gemm.k),
                gemm.recipe if in_fp8 else precision,
                verdict.kind if in_fp8 else precision,
                f"{100 * gemm.waste:.2f} %" if padded else "",
                verdict.note,
            )
        )
    return "\n".join([*_aligned(rows), "", f"in FP8: {100 * fp8_share(gemms):.1f} % of the FLOPs of these products"])


def gemm_json(gemms: Sequence[Gemm], problems: Sequence[str]) -> str:
    """The same as JSON: `gemms`, each with the fields of `Gemm` and its verdict; `fp8_share`; `problems`."""
    described = [
        asdict(gemm) | {"flops": gemm.flops, "waste": gemm.waste, "verdict": verdict.kind, "note": verdict.note}
        for gemm in gemms
        for verdict in [assess(gemm)]
    ]
    return json.dumps({"gemms": described, "fp8_share": fp8_share(gemms), "problems": [*problems]}, indent=2)


def memory_table(plan: Sequence[RankMemory], *, world_size: int) -> str:
    """One line per place in the pipeline, GiB."""
    parts = [field.name for field in fields(RankMemory)]
    rows: list[tuple[str, ...]] = [("pipeline rank", "in all", *(part.replace("_", " ") for part in parts))]
    for rank, memory in enumerate(plan):
        sizes = (memory.total, *(getattr(memory, part) for part in parts))
        rows.append((str(rank), *(f"{size / GIB:.2f}" for size in sizes)))
    processes = "1 process" if world_size == 1 else f"{world_size:,} processes"
    return "\n".join([*_aligned(rows), "", f"planned, GiB on each rank, for {processes}; an estimate"])


def memory_json(plan: Sequence[RankMemory], problem: str | None) -> str:
    """The same as JSON, in bytes: `ranks` by place in the pipeline, each with its `total`; `problem`."""
    return json.dumps(
        {"ranks": [asdict(memory) | {"total": memory.total} for memory in plan], "problem": problem}, indent=2
    )


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _rows(count: float) -> str:
    """A number of rows, which may be an expected one."""
    return f"{count:.1f}".removesuffix(".0")


def human(number: float) -> str:
    """A count in at most four digits: 9.4M, 302M, 29.95B."""
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= factor:
            return f"{number / factor:.4g}{unit}"
    return f"{number:.4g}"
