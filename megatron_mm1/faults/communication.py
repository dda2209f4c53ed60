"""How long a rank waits in communication, so that what is left is its own work."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.distributed import ProcessGroup, Work

_CALLS = (
    "allgather",
    "_allgather_base",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "recv",
    "reduce",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)
"""Of ProcessGroup: what every function of torch.distributed comes down to."""


class Stopwatch:
    """Adds up the time of blocks: the host's, or the device's current stream's where there is one.

    On a device the stream waits where the host does not, and what runs beside it costs nothing.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        if not torch.cuda.is_available():
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((start, end))

    def seconds(self) -> float:
        """So far; waits for the device."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds


@contextmanager
def timed_communication() -> Iterator[Stopwatch]:
    """Time every call of a process group and every wait for one while the block runs."""
    stopwatch = Stopwatch()
    originals: list[tuple[type, str, Any]] = [(ProcessGroup, name, getattr(ProcessGroup, name)) for name in _CALLS]
    originals.append((Work, "wait", Work.wait))
    for owner, name, function in originals:
        setattr(owner, name, _timed(function, stopwatch))
    try:
        yield stopwatch
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def _timed(function: Callable[..., Any], stopwatch: Stopwatch) -> Callable[..., Any]:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with stopwatch.running():
            return function(*args, **kwargs)

    return timed
