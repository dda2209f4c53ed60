"""Worker processes that run one job after the other, since importing megatron-core takes seconds.

A job is a module-level function; every worker runs it with the same arguments, inside an initialised process group
(NCCL on its own GPU, or gloo), and the pool returns what each rank returned.
"""

import faulthandler
import math
import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

GRACE_SECONDS = 5
"""How long the other ranks may take to answer after one has failed."""
STACK_SECONDS = 2
"""How long they then have to write down where they stand."""
CLOSE_SECONDS = 10
"""How long the workers have to end by themselves."""


class WorkerError(Exception):
    """A job failed; the message holds the traceback of each rank that raised, and where each other rank stood."""


class Pool:
    """`world_size` processes that run jobs together.

    Args:
        world_size: number of processes.
        timeout_minutes: how long a job may take, the start of the workers included, and a collective wait.
        initializer: a module-level function that each worker calls first, before it imports torch or megatron-core.
    """

    def __init__(
        self, world_size: int, *, timeout_minutes: float = 10, initializer: Callable[[], None] | None = None
    ) -> None:
        self.timeout_seconds = 60 * timeout_minutes
        context = multiprocessing.get_context("spawn")  # DALI and gloo do not survive a fork
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.connections: list[Any] = []
        self.processes: list[Any] = []
        self._stacks = tempfile.TemporaryDirectory(prefix="mm1-stacks-")
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            # Not daemons: writing a checkpoint starts a process. They end when the pipe to the parent closes.
            process = context.Process(
                target=_work,
                args=(rank, world_size, port, theirs, timeout_minutes, self._stack_file(rank), initializer),
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, job: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Run `job` on every rank; returns the results in rank order.

        Raises:
            WorkerError: a rank raised, died, or did not answer in time. The pool cannot be used afterwards.
        """
        for connection in self.connections:
            connection.send((job, args, kwargs))
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        waiting = dict(zip(self.connections, range(len(self.connections)), strict=True))
        deadline = time.monotonic() + self.timeout_seconds
        while waiting:
            ready: list[Any] = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    error, results[rank] = connection.recv()
                except EOFError:
                    error = "the process died"
                if error:
                    errors[rank] = error
                    # Once one rank has failed the others wait for it in a collective.
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if waiting and time.monotonic() >= deadline:
                errors |= self._where(list(waiting.values()))
                break
        if errors:
            self.close()
            raise WorkerError("\n".join(f"rank {rank}: {error}" for rank, error in errors.items()))
        return [results[rank] for rank in range(len(self.connections))]

    def _stack_file(self, rank: int) -> Path:
        return Path(self._stacks.name) / str(rank)

    def _where(self, ranks: Sequence[int]) -> dict[int, str]:
        """What to say of ranks that do not answer: the Python stack that each stands in."""
        started = [rank for rank in ranks if self._stack_file(rank).exists()]
        for rank in started:
            os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(STACK_SECONDS)
        stacks = {rank: self._stack_file(rank).read_text() for rank in started}
        return {rank: f"no answer in time\n{stacks.get(rank, 'it had not started')}" for rank in ranks}

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        """End the workers: by themselves when their pipe closes, so that they take their own children along, or by
        force.
        """
        for connection in self.connections:
            connection.close()
        deadline = time.monotonic() + CLOSE_SECONDS
        for process in self.processes:
            process.join(timeout=max(deadline - time.monotonic(), 0))
        for process in self.processes:
            process.terminate()
            process.join(timeout=CLOSE_SECONDS)
        self._stacks.cleanup()


def _work(
    rank: int,
    world_size: int,
    port: int,
    connection: Any,
    timeout_minutes: float,
    stack_file: Path,
    initializer: Callable[[], None] | None,
) -> None:
    faulthandler.register(signal.SIGUSR1, file=stack_file.open("w"), all_threads=False)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # float32 products in float32: read when CUDA starts
    if initializer is not None:
        initializer()
    import torch

    from megatron_mm1.parallel.groups import initialize_process_group

    torch.set_num_threads(1)
    initialize_process_group(timeout_minutes=math.ceil(timeout_minutes) + 1)  # the pool gives up first
    while True:
        try:
            job, args, kwargs = connection.recv()
        except EOFError:
            return
        answer: tuple[str | None, Any]
        try:
            answer = (None, job(*args, **kwargs))
        except Exception:
            answer = (traceback.format_exc(), None)
        try:
            connection.send(answer)
        except OSError:  # nobody waits for it any more
            return
