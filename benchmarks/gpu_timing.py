"""Milliseconds on a CUDA device, and the rate of its largest matrix products."""

from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch

GEMM_SIZE = 8192
GEMM_REPEATS = 20


def milliseconds(work: Callable[[], object], *, warm_up: int, repeats: int) -> list[float]:
    """Device time of each call of `work`, from one CUDA event to the next, after `warm_up` calls that do not count."""
    for _ in range(warm_up):
        work()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return [earlier.elapsed_time(later) for earlier, later in pairwise(events)]


def gemm_rates() -> dict[str, float]:
    """TFLOP/s of a product of two square matrices: "bf16" by torch.matmul, "fp8" (e4m3, one scale each, fast
    accumulation, bf16 result) by torch._scaled_mm.
    """
    left, right = (torch.randn(GEMM_SIZE, GEMM_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    scale = torch.ones((), device="cuda")
    left8, right8 = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()  # the second column by column

    def in_fp8() -> torch.Tensor:
        return torch._scaled_mm(
            left8, right8, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    work: dict[str, Callable[[], torch.Tensor]] = {"bf16": lambda: left @ right, "fp8": in_fp8}
    flops = 2 * GEMM_SIZE**3
    return {
        name: flops / median(milliseconds(product, warm_up=5, repeats=GEMM_REPEATS)) / 1e9
        for name, product in work.items()
    }
