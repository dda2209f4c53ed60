"""A job whose ranks watch each other: when one dies, fails or stops, the others end and say which, and where it was."""

import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from megatron_mm1.errors import UserError
from megatron_mm1.faults.heartbeat import OWN_FAILURE, Follower, Leader, Parting, Watcher
from megatron_mm1.faults.liveness import RollCall, Status
from megatron_mm1.faults.meeting import join_meeting, open_meeting
from megatron_mm1.faults.stacks import place_of

INTERVAL = 1.0
"""Seconds between a rank's heartbeats; longer where there are so many ranks that rank 0 would be kept busy."""
_HEARTBEATS_PER_SECOND = 1000
_LONGEST_ERROR = 500


class Pulse:
    """Where this rank's main thread is: it says so, the heartbeat thread reads it."""

    def __init__(self, rank: int = 0) -> None:
        self.status = Status(rank=rank, host=socket.gethostname(), pid=os.getpid())
        self._thread = threading.get_ident()

    def observed(self) -> Status:
        """Where the main thread is, and where in the program; any thread may ask."""
        return replace(self.status, place=place_of(self._thread))

    def enter(self, phase: str, *, step: int) -> None:
        """Begin a phase of a step: "data", "step", "validation", "evaluation", "checkpoint", "end"."""
        before = self.status
        # One assignment, so that the other thread never reads half of it.
        self.status = replace(
            before,
            step=step,
            phase=phase,
            moves=before.moves + 1,
            settled=before.settled or before.phase == "step",
        )


@contextmanager
def watched(
    store: torch.distributed.Store,
    *,
    rank: int,
    world_size: int,
    silence_limit: float,
    standstill_limit: float,
    stacks: Path | None = None,
) -> Iterator[Pulse]:
    """Watch the ranks while the block runs; the block keeps the pulse up to date.

    If a rank dies, stops or raises an error, every process is ended, by `os._exit`, with a line that names it and its
    step. A `UserError` is raised on, as mostly every rank meets it; where one rank does alone, the others are ended.
    One process alone runs no thread.

    Args:
        store: by which the ranks find rank 0; used before this returns, and not after.
        silence_limit: seconds without a heartbeat after which a rank counts as dead; 0: the ranks are not watched.
        standstill_limit: seconds without any rank's step or phase changing after which the job counts as stuck. It
            holds from the end of the first step, and not during checkpoints.
        stacks: folder where every rank then writes down where its threads stand; None: nowhere.

    Raises:
        UserError: rank 0 cannot be reached.
    """
    pulse = Pulse(rank)
    if world_size == 1 or not silence_limit:
        yield pulse
        return
    interval = min(max(INTERVAL, world_size / _HEARTBEATS_PER_SECOND), silence_limit / 5)
    limits = {"interval": interval, "silence_limit": silence_limit}
    watcher: Watcher
    if rank == 0:
        listener, token = open_meeting(store, world_size=world_size, leader=pulse.status)
        roll = RollCall(world_size, standstill_limit=standstill_limit, now=time.monotonic(), **limits)
        watcher = Leader(pulse.observed, listener, token=token, roll=roll, stacks=stacks, **limits)
    else:
        connection, token, leader = join_meeting(store)
        watcher = Follower(pulse.observed, connection, token=token, leader=leader, stacks=stacks, **limits)
    watcher.start()
    try:
        yield pulse
    except UserError as error:
        watcher.part(Parting("user error", _one_line(error)))
        raise
    except (KeyboardInterrupt, SystemExit) as error:
        watcher.part(Parting("user error", type(error).__name__))
        raise
    except BaseException as error:
        _fail(watcher, error)
    else:
        watcher.part(Parting("done"))


def _fail(watcher: Watcher, error: BaseException) -> None:
    """Report an error and end the process: destroying process groups would wait for peers that are stuck."""
    status = watcher.status()
    error.add_note(f"{status.who} failed {status.where}")
    if _is_from_collective(error):
        watcher.part(Parting("failed in collective", _one_line(error)), error=error)
        traceback.print_exception(error)  # there was no verdict
    else:
        traceback.print_exception(error)  # before the verdict, at which launchers end everything
        watcher.part(Parting("failed", f"{type(error).__name__}: {_one_line(error)}"))
    os._exit(OWN_FAILURE)


def _is_from_collective(error: BaseException) -> bool:
    """Whether an error comes from communication, so that a peer may be its cause. Gloo's have no type of their own."""
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:_LONGEST_ERROR]
