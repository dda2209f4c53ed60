"""Where the host waits for the device: found by torch's own warnings, and in the profiler's record of CUDA calls.

The warnings say where in Python, but see only what torch itself waits for; the profiler sees every CUDA call of the
process, Transformer Engine's too.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("megatron_mm1", "megatron/core", "transformer_engine")
REGION = "the measured steps"
_WARNING = "called a synchronizing CUDA operation"
_CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass
class Waits:
    """Attributes:
    stacks: of each wait: its frames in PACKAGES, outermost first, as "training/step.py:197 _global_statistics".
    """

    stacks: list[tuple[str, ...]] = field(default_factory=list)

    def elsewhere(self, allowed: Sequence[str]) -> Counter[str]:
        """Waits whose stack has none of these functions ("step.py _global_statistics"), by their innermost frames."""
        return Counter(" < ".join(reversed(stack[-4:])) for stack in self.stacks if not _passes(stack, allowed))


def _passes(stack: tuple[str, ...], functions: Sequence[str]) -> bool:
    frames = {f"{Path(place.rsplit(':', 1)[0]).name} {name}" for place, name in map(str.split, stack)}
    return any(function in frames for function in functions)


@contextmanager
def recorded_waits() -> Iterator[Waits]:
    """Note every operation of torch that waits for the device while the block lasts.

    What the autograd engine's own threads warn of is handed to the thread that called `backward`.
    """
    waits, mode = Waits(), torch.cuda.get_sync_debug_mode()

    def note(message: Any, *args: Any, **kwargs: Any) -> None:
        if _WARNING in str(message):
            waits.stacks.append(_frames())

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def _frames() -> tuple[str, ...]:
    """The stack's frames in PACKAGES."""
    frames = []
    for frame in traceback.extract_stack():
        for package in () if frame.filename == __file__ else PACKAGES:
            _, found, within = frame.filename.partition(f"/{package}/")
            if found:
                frames.append(f"{within}:{frame.lineno} {frame.name}")
                break
    return tuple(frames) or ("elsewhere:0 unknown",)


def counted_calls(run: Callable[[], Any]) -> Counter[str]:
    """How often `run` made the host wait, by CUDA call, and how many copies it made from the device to the host."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        with torch.profiler.record_function(REGION):
            run()
        torch.cuda.synchronize()
    return waiting_calls(profiler.events())


def waiting_calls(events: Sequence[Any]) -> Counter[str]:
    """Of a profile: the calls made within REGION, and the copies, which run when the device comes to them."""
    [region] = [event for event in events if event.name == REGION and event.device_type.name == "CPU"]
    span, counts = region.time_range, Counter[str]()
    for event in events:
        if event.name in _CALLS and span.start <= event.time_range.start <= span.end:
            counts[event.name] += 1
        elif event.name.startswith("Memcpy DtoH"):
            counts["Memcpy DtoH"] += 1
    return counts
