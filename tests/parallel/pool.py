"""Worker processes for parallel tests: one pool per world size for the whole session, since importing megatron-core
takes seconds.

A job is a module-level function; every worker runs it with the same arguments, inside an initialised gloo process
group, and the pool returns what each rank returned.
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT_SECONDS = 240


class WorkerError(Exception):
    """A job failed; the message holds the traceback of each rank that raised."""


class Pool:
    """`world_size` processes that run jobs together.

    Args:
        world_size: number of processes.
    """

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")  # DALI and gloo do not survive a fork
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.connections, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            # Not daemons: writing a checkpoint starts a process. They end when the pipe to the parent closes.
            process = context.Process(target=_work, args=(rank, world_size, port, theirs))
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
        results, errors = [], []
        for rank, connection in enumerate(self.connections):
            # Once one rank has failed the others wait for it in a collective.
            if not connection.poll(5 if errors else TIMEOUT_SECONDS):
                errors.append(f"rank {rank} did not answer within {TIMEOUT_SECONDS} s")
                continue
            try:
                error, result = connection.recv()
            except EOFError:
                error, result = "the process died", None
            results.append(result)
            if error:
                errors.append(f"rank {rank}: {error}")
        if errors:
            self.close()
            raise WorkerError("\n".join(errors))
        return results

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        """End the workers: by themselves when their pipe closes, so that they take their own children along, or by
        force.
        """
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()
                process.join(timeout=10)


def _work(rank: int, world_size: int, port: int, connection: Any) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import torch

    from megatron_mm1.parallel.groups import initialize_process_group

    torch.set_num_threads(1)
    initialize_process_group(timeout_minutes=5)
    while True:
        try:
            job, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            connection.send((None, job(*args, **kwargs)))
        except Exception:
            connection.send((traceback.format_exc(), None))
