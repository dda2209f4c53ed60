"""Where the threads of a process stand: in a few words for the ranks' comparison, and whole in a file."""

import faulthandler
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType

COMMUNICATION = (
    "/torch/distributed/",
    "/megatron/core/pipeline_parallel/p2p_communication.py",
    "/megatron_mm1/faults/communication.py",
)
"""Files whose functions wait for other ranks; ours wraps the calls of a process group while they are timed."""
SIGNAL = signal.SIGUSR2
"""Makes a rank write its stacks down and go on."""


def stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.txt"


def write_stacks(folder: Path, rank: int, *, title: str) -> Path | None:
    """Add the Python stacks of all threads to this rank's file in `folder`.

    Returns:
        The file; None: it cannot be written.
    """
    file = stack_file(folder, rank)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file.open("a") as output:
            print(f"\n{datetime.now():%Y-%m-%d %H:%M:%S} {title}", file=output, flush=True)
            faulthandler.dump_traceback(file=output)
    except OSError:
        return None
    return file


@contextmanager
def stacks_on_signal(folder: Path, rank: int) -> Iterator[None]:
    """While the block runs, `SIGNAL` adds the stacks of all threads to this rank's file.

    faulthandler does it from the signal handler itself, so that it works in a thread that never gives Python's lock
    back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with stack_file(folder, rank).open("a") as file:
        faulthandler.register(SIGNAL, file=file, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(SIGNAL)


def place_of(thread: int) -> str:
    """Where a thread is: "waiting in all_reduce at step.py:201" in communication, else "in forward at step.py:57".

    Args:
        thread: its identifier; any thread may ask.
    """
    frame = sys._current_frames().get(thread)
    return "" if frame is None else _place(frame)


def waits_for_others(place: str) -> bool:
    """Whether a place that `place_of` named is in communication."""
    return place.startswith("waiting ")


def _place(innermost: FrameType) -> str:
    called = None
    frame: FrameType | None = innermost
    while frame is not None and any(part in frame.f_code.co_filename for part in COMMUNICATION):
        if frame.f_code.co_name != "wrapper":  # torch's logging around the function that was called
            called = frame.f_code.co_name
        frame = frame.f_back
    caller = frame or innermost
    where = f"at {Path(caller.f_code.co_filename).name}:{caller.f_lineno}"
    return f"in {caller.f_code.co_name} {where}" if called is None else f"waiting in {called} {where}"
