"""One variant of one slice on the GPU, in a process of its own: everything that is measured about it."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_kernels import profile_step
from gpu_results import write_json
from gpu_slices import VARIANTS, Variant, cut
from gpu_subjects import build_subject
from gpu_timing import gemm_rates, milliseconds

from megatron_mm1.errors import UserError
from megatron_mm1.planning.memory import GIB

PEAK_TFLOPS = 989.4
"""Published dense BF16 peak of an H100 SXM, TFLOP/s: MFU is a share of it, also in FP8."""


@dataclass(frozen=True)
class Timed:
    """A part's speed.

    Attributes:
        milliseconds: median.
        tflops: model TFLOP/s.
        mfu: share of PEAK_TFLOPS.
    """

    milliseconds: float
    tflops: float
    mfu: float

    @classmethod
    def of(cls, times: list[float], flops: float) -> "Timed":
        tflops = flops / median(times) / 1e9
        return cls(milliseconds=median(times), tflops=tflops, mfu=tflops / PEAK_TFLOPS)


def measure_into(file: Path, *, preset: str, variant: str, microbatches: int, steps: int, warm_up: int) -> None:
    """Measure; `file` has what is known so far at every moment, and the error where there is one.

    Args:
        steps, warm_up: that count, and before them; the parts are run twice as often.
    """
    record: dict[str, Any] = {"slice": preset, "variant": variant, "status": "running"}
    try:
        _measure(record, file, VARIANTS[variant], microbatches=microbatches, steps=steps, warm_up=warm_up)
        record["status"] = "measured"
    except Exception as error:  # out of memory, a kernel that the card lacks: the other variants go on
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
    write_json(file, record)


def _measure(
    record: dict[str, Any], file: Path, variant: Variant, *, microbatches: int, steps: int, warm_up: int
) -> None:
    piece = cut(record["slice"], microbatches=microbatches)
    rates = gemm_rates()
    subject = build_subject(piece, variant)
    record |= {"settings": subject.settings, "gemm_tflops": rates}
    write_json(file, record)

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    losses: list[float] = []
    times = milliseconds(lambda: losses.append(subject.step()), warm_up=warm_up, repeats=steps)
    if not all(map(math.isfinite, losses)):
        raise UserError(f"the losses of the timed steps are not finite ({losses}): nothing trained, so no speed counts")
    step = Timed.of(times, piece.step_flops())
    record |= {
        "step": asdict(step),
        "tokens_per_second": 1000 * piece.positions / step.milliseconds,
        "gemm_efficiency": step.tflops / rates["bf16" if variant.recipe == "bf16" else "fp8"],
        "peak_memory_gib": torch.cuda.max_memory_allocated() / GIB,
        "losses": losses,
        "step_milliseconds": times,
    }
    write_json(file, record)

    parts = {"decoder": (subject.decoder, piece.decoder_flops()), "tower": (subject.tower, piece.tower_flops())}
    for name, (work, flops) in parts.items():
        record[name] = asdict(Timed.of(milliseconds(work, warm_up=2 * warm_up, repeats=2 * steps), flops))
        write_json(file, record)
    profile = profile_step(subject.step)
    record["kernels"] = asdict(profile)
