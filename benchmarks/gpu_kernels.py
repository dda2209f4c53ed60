"""Where a step's time on the device goes and how often the host waits for it, from a trace of torch.profiler."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

STEP = "benchmarked step"

RULES: tuple[tuple[str, str], ...] = (
    ("optimizer", r"multi_?tensor|adam|l2norm"),
    ("attention", r"sdpa|flash|fmha|fused_attn|flex_attention|mha_|softmax_lse|varlen"),
    ("convolution", r"fprop|dgrad(?!.*gemm_)|wgrad(?!.*gemm_)|conv(?!ert)|implicit"),
    ("norm", r"rms_?norm|layer_?norm|normalization::|ln_(fwd|bwd)|rowwisemoments|gammabeta|batch_?norm"),
    ("gemm", r"gemm|nvjet|cutlass|splitk|gemv|cublas|_mm_|triton_tem"),
    ("quantize", r"quantize|cast_(only|transpose)|fp8|amax|delayed_scaling|block_scaled|scale_inv"),
    ("memcpy", r"^memcpy|^memset"),
    (
        "elementwise",
        r"elementwise|triton_(poi|red|per)|reduce_kernel|copy|fill|act|swiglu|glu|rope|rotary|permut|softmax|"
        r"cross_?entropy|index|gather|scatter|embedding|cat|transpose|add|mul|dropout|where|arange|"
        r"sort|scan|topk|compare|radix|pad|upsample|pool",
    ),
)
"""(kind, pattern of the kernel's name, case ignored); the first that matches counts."""

OTHER = "other"
KINDS = (*(kind for kind, _ in RULES), OTHER)

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaMemset")
"""Calls of the CUDA runtime that make the host wait; cudaMemcpyAsync alone does not."""


def kernel_kind(name: str) -> str:
    """Which of KINDS a kernel belongs to."""
    return next((kind for kind, pattern in RULES if re.search(pattern, name, re.IGNORECASE)), OTHER)


@dataclass(frozen=True)
class StepProfile:
    """One step.

    Attributes:
        milliseconds: device time by kind; kernels of several streams may overlap.
        unknown: the longest kernels of kind "other", milliseconds by name.
        waits: how often the host waited for the device, by the runtime's call.
    """

    milliseconds: Mapping[str, float]
    unknown: Mapping[str, float]
    waits: Mapping[str, int]


def profile_step(step: Callable[[], object]) -> StepProfile:
    """Run one step under the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        with torch.profiler.record_function(STEP):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return summarize(json.loads(file.read_text())["traceEvents"])


def summarize(events: Iterable[Mapping[str, Any]], *, longest: int = 5) -> StepProfile:
    """The profile of a trace in Chrome's format; waits count where the step began them.

    Raises:
        ValueError: the trace has no kernel or does not say where the step is.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    steps = [event for event in complete if event["name"] == STEP and event.get("cat") == "user_annotation"]
    on_device = [event for event in complete if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if len(steps) != 1 or not on_device:
        raise ValueError(
            f"the profiler's trace has {len(steps)} steps and {len(on_device)} kernels: expected 1 and some"
        )
    times, unknown = dict.fromkeys(KINDS, 0.0), Counter[str]()
    for event in on_device:
        kind = kernel_kind(event["name"])
        times[kind] += event["dur"] / 1000
        if kind == OTHER:
            unknown[event["name"]] += event["dur"] / 1000
    start, stop = steps[0]["ts"], steps[0]["ts"] + steps[0]["dur"]
    waits = Counter(
        event["name"]
        for event in complete
        if event.get("cat") == "cuda_runtime" and event["name"] in WAITS and start <= event["ts"] <= stop
    )
    return StepProfile(milliseconds=times, unknown=dict(unknown.most_common(longest)), waits=dict(waits))
