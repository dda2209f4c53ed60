"""What benchmarks/gpu.py found: records of the variants, as a table, as goals, in JSON and as a card."""

import json
import math
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from goals import Goal
from gpu_slices import VARIANTS, Slice, Variant, example_lengths

from megatron_mm1.planning.memory import GIB

Record = Mapping[str, Any]
"""Of one variant of one slice, as `gpu_measure` writes it; `status` is measured, failed or not run."""

DECODER_MFU, TOWER_MFU, STEP_MFU, FP8_SPEEDUP = 0.50, 0.40, 0.45, 1.35


def write_json(file: Path, value: object) -> None:
    """In one piece: whoever reads the file meanwhile finds the earlier content."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(file)


def table(rows: Sequence[tuple[Slice, Variant, Record]]) -> str:
    """One line per variant; a figure that was not measured is a dash."""
    lines = [
        (
            "slice",
            "blocks",
            "variant",
            "step TFLOP",
            "memory est. GiB",
            "measured",
            "tokens/s",
            "TFLOP/s",
            "MFU",
            "decoder MFU",
            "tower MFU",
            "GEMM eff.",
        )
    ]
    for piece, variant, record in rows:
        lines.append(
            (
                piece.preset,
                str(piece.config.model.decoder.num_layers),
                variant.name,
                f"{piece.step_flops() / 1e12:.1f}",
                f"{piece.memory(variant).total / GIB:.1f}",
                _shown(record, "peak_memory_gib", digits=1),
                _shown(record, "tokens_per_second"),
                _shown(record, "step", "tflops"),
                _shown(record, "step", "mfu", digits=3),
                _shown(record, "decoder", "mfu", digits=3),
                _shown(record, "tower", "mfu", digits=3),
                _shown(record, "gemm_efficiency", digits=3),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _shown(record: Record, *path: str, digits: int = 0) -> str:
    value = figure(record, *path)
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"


def figure(record: Record, *path: str) -> float:
    """A figure of a record; NaN where it was not measured."""
    value: Any = record
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return math.nan if value is None else float(value)


def goals_of(rows: Sequence[tuple[Slice, Variant, Record]]) -> list[Goal]:
    """The goals of every dense slice; one that was not measured holds none."""
    records = {(piece.preset, variant.name): record for piece, variant, record in rows}
    goals = []
    for name in dict.fromkeys(piece.preset for piece, _, _ in rows if piece.is_dense):
        plain = records.get((name, "bf16"), {})
        in_fp8 = [records.get((name, variant.name), {}) for variant in VARIANTS.values() if variant.recipe != "bf16"]
        times = [figure(record, "decoder", "milliseconds") for record in in_fp8]
        fastest = min((time for time in times if not math.isnan(time)), default=math.nan)
        speedup = figure(plain, "decoder", "milliseconds") / fastest
        goals += [
            Goal(f"decoder_mfu_{name}", figure(plain, "decoder", "mfu"), "of_peak", ">", DECODER_MFU),
            Goal(f"fp8_speedup_{name}", speedup, "bf16/fp8", ">", FP8_SPEEDUP),
            Goal(f"tower_mfu_{name}", figure(plain, "tower", "mfu"), "of_peak", ">", TOWER_MFU),
            Goal(f"step_mfu_{name}", figure(plain, "step", "mfu"), "of_peak", ">", STEP_MFU),
        ]
    return goals


def card(
    piece: Slice, records: Sequence[tuple[Variant, Record]], *, machine: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """What was run on what, and every figure: the content of benchmarks/cards/<preset>-<date>.yaml."""
    config = piece.config
    rows = [(piece, variant, record) for variant, record in records]
    return {
        "preset": piece.preset,
        "date": date.today().isoformat(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": commit(),
        **machine,
        "settings": {
            "decoder_blocks": config.model.decoder.num_layers,
            "experts": None if config.model.moe is None else config.model.moe.num_moe_experts,
            "positions_per_sequence": config.data.seq_length,
            "images_per_sequence": config.data.max_images_per_sequence,
            "example_lengths": list(example_lengths(config)),
            "sequences_per_microbatch": 1,
            "microbatches_per_step": config.training.global_batch_size,
            "step_tflop": piece.step_flops() / 1e12,
            **options,
        },
        "goals": {
            goal.name: {
                "value": None if math.isnan(goal.value) else goal.value,
                "bound": goal.bound,
                "holds": goal.holds,
            }
            for goal in goals_of(rows)
        },
        "variants": {
            variant.name: {"memory_estimate_gib": piece.memory(variant).total / GIB, **_figures(record)}
            for variant, record in records
        },
    }


def _figures(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("slice", "variant")}


def write_cards(folder: Path, cards: Sequence[Mapping[str, Any]]) -> list[Path]:
    """One file per preset and day."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for content in cards:
        file = folder / f"{content['preset']}-{content['date']}.yaml"
        # By way of JSON, which takes subclasses of str and the like for what they are; YAML refuses them.
        plain = json.loads(json.dumps(content, default=str))
        file.write_text(yaml.safe_dump(plain, sort_keys=False, width=120))
        files.append(file)
    return files


def commit() -> str:
    """The commit that is checked out, and whether the working tree differs from it; "unknown" outside a repository."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, Any]:
    """The card, its driver and clocks, and the versions that decide its speed. Asks a CUDA device."""
    import torch

    device = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.sm,clocks.max.sm,power.limit"
    try:
        answer = subprocess.run(
            ["nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout
        driver = dict(zip(query.split(","), (part.strip() for part in answer.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):
        driver = {"driver_version": "unknown"}
    return {
        "device": {"name": device.name, "memory_gib": device.total_memory / GIB, **driver},
        "versions": {
            "python": sys.version.split()[0],
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "cudnn": _cudnn_version(),
            **{name: _version(name) for name in ("transformer-engine", "megatron-core", "triton", "apex")},
        },
    }


def _cudnn_version() -> int | str:
    import torch

    try:
        return torch.backends.cudnn.version() or "none"
    except RuntimeError as error:  # another cuDNN than the one torch was built with was found first
        return str(error).split(". ")[0]


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
