"""A rank of a job that all-reduces step after step, and what goes wrong on one of them: a worker of test_liveness.

It watches and communicates as a training run does, without a model, so that it starts in a second.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore, TCPStore

from megatron_mm1.errors import UserError
from megatron_mm1.faults.watch import Pulse, watched

FAULTY_STEP = 4
LAST_STEP = 8


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def raises() -> None:
    raise ValueError("the data says\nnothing")


def meets_user_error() -> None:
    raise UserError("no space left on this machine")


def hangs() -> None:
    time.sleep(600)


FAULTS = {function.__name__: function for function in (killed, stopped, raises, meets_user_error, hangs)}


def train(pulse: Pulse, fault: str | None) -> None:
    for step in range(1, LAST_STEP + 1):
        pulse.enter("data", step=step)
        if step == FAULTY_STEP and fault == "hangs_in_step":
            pulse.enter("step", step=step)
            print("clock", time.monotonic(), flush=True)
            hangs()
        if step == FAULTY_STEP and fault is not None:
            time.sleep(0.3)  # until the others wait for this rank
            print("clock", time.monotonic(), flush=True)
            FAULTS[fault]()
        pulse.enter("step", step=step)
        torch.distributed.all_reduce(torch.ones(4))


def run_rank(
    fault: str | None,
    *,
    silence_limit: float,
    standstill_limit: float,
    collective_timeout: float,
    stacks: Path | None = None,
) -> int:
    """Train as the launcher's environment says, with `fault` on this rank; the exit code is 2 for a user's error."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = PrefixStore("test", TCPStore(*master, world_size, is_master))
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=collective_timeout)
    )
    limits = {"silence_limit": silence_limit, "standstill_limit": standstill_limit}
    try:
        with watched(store, rank=rank, world_size=world_size, stacks=stacks, **limits) as pulse:
            train(pulse, fault)
            torch.distributed.barrier()
            print("clock", time.monotonic())
    except UserError:
        return 2
    finally:
        print("clock", time.monotonic())
        torch.distributed.destroy_process_group()
    return 0


def start_rank(output: Path, environment: dict[str, str], fault: str | None, options: dict[str, Any]) -> None:
    """The target of a `multiprocessing.Process`: both outputs go to a file."""
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(run_rank(fault, **options))


if __name__ == "__main__":  # torchrun: FAULT RANK
    fault = sys.argv[1] if os.environ["RANK"] == sys.argv[2] else None
    sys.exit(run_rank(fault, silence_limit=4, standstill_limit=60, collective_timeout=60))
