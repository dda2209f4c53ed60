"""Items made ahead of time, in order: by worker processes, or by a thread.

A worker that dies (out of memory, kill -9) is noticed by the end of its pipe, and another one makes anew what it had
not delivered: items are functions of their index alone, so the stream does not change.
"""

import logging
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any

import torch.multiprocessing  # shares tensors with the receiver instead of copying them through the pipe

from megatron_mm1.data.processes import use_one_core
from megatron_mm1.errors import UserError

Make = Callable[[Any], Any]
_GONE = (EOFError, OSError)  # what a pipe, or a tensor shared over it, raises when the other end is dead
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Failure:
    """An exception on its way out of a worker: tracebacks do not pickle."""

    message: str
    is_users: bool

    def reraise(self) -> None:
        raise UserError(self.message) if self.is_users else RuntimeError(f"in a loader process:\n{self.message}")


@dataclass
class _Worker:
    """One process and the tasks it has been given and has not delivered."""

    process: Any
    pipe: Connection
    tasks: deque[tuple[int, Any]] = field(default_factory=deque)


class WorkerPool:
    """Processes that call `make(index)`, each for every n-th index of a pass.

    They are spawned, not forked (a fork after DALI or CUDA was used hangs), when the first pass starts.

    Args:
        make: a picklable function; an exception of it ends the pass.
        num_workers: processes.
        prefetch: results that each keeps ready.
        max_restarts: deaths without a result between them that are made good.
    """

    def __init__(self, make: Make, *, num_workers: int, prefetch: int, max_restarts: int) -> None:
        self._make, self._num_workers, self._prefetch = make, num_workers, prefetch
        self._max_restarts, self._restarts = max_restarts, 0
        self._context = torch.multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._ticket = 0
        # Before multiprocessing waits, at exit, for workers that heed no SIGTERM.
        Finalize(self, _end, args=(self._workers,), exitpriority=0)

    def run(self, indices: Iterable[Any]) -> Iterator[Any]:
        """One pass: `make(index)` for each index, in order. A pass that is given up does not disturb the next one.

        Raises:
            UserError: of `make`; or workers die over and over.
        """
        waiting: deque[_Worker] = deque()
        source = iter(indices)
        while len(self._workers) < self._num_workers:
            self._workers.append(self._start())
        for worker in self._workers:
            worker.tasks.clear()
        first = self._ticket
        while True:
            while len(waiting) < self._num_workers * self._prefetch:
                try:
                    index = next(source)
                except StopIteration:
                    break
                worker = self._workers[(self._ticket - first) % self._num_workers]
                self._give(worker, (self._ticket, index))
                waiting.append(worker)
                self._ticket += 1
            if not waiting:
                return
            result = self._take(waiting.popleft())
            if isinstance(result, _Failure):
                result.reraise()
            yield result

    def close(self) -> None:
        """End the workers."""
        _end(self._workers)

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(self._make, theirs), name="data-worker", daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _give(self, worker: _Worker, task: tuple[int, Any]) -> None:
        worker.tasks.append(task)
        with suppress(*_GONE):  # `_take` finds out and gives all its tasks to another
            worker.pipe.send(task)

    def _take(self, worker: _Worker) -> Any:
        """The result of the worker's first task; results of passes that were given up come before it."""
        while True:
            try:
                ticket, result = worker.pipe.recv()
            except _GONE:
                self._replace(worker)
                continue
            if ticket == worker.tasks[0][0]:
                worker.tasks.popleft()
                self._restarts = 0
                return result

    def _replace(self, worker: _Worker) -> None:
        worker.pipe.close()
        worker.process.kill()  # it may live on without its pipe
        worker.process.join()
        code = worker.process.exitcode
        self._restarts += 1
        if self._restarts > self._max_restarts:
            raise UserError(
                f"loader processes died {self._restarts} times in a row (the last with exit code {code}), often for "
                "want of memory: lower data.num_workers or data.prefetch_factor, or see the kernel's log"
            )
        _log.warning(
            "loader process %d died with exit code %s; another one starts where it stopped (%d of %d)",
            worker.process.pid,
            code,
            self._restarts,
            self._max_restarts,
        )
        new = self._start()
        worker.process, worker.pipe = new.process, new.pipe
        tasks, worker.tasks = worker.tasks, deque()
        for task in tasks:
            self._give(worker, task)


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.pipe.close()
        worker.process.kill()
    for worker in workers:
        worker.process.join()
    workers.clear()


def _work(make: Make, pipe: Connection) -> None:
    """A worker's life."""
    use_one_core()
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # a whole job's, to which the trainer sees
        signal.signal(number, signal.SIG_IGN)
    try:
        while True:
            ticket, index = pipe.recv()
            pipe.send((ticket, _made(make, index)))
    except _GONE:
        return  # nobody wants more


def _made(make: Make, index: Any) -> Any:
    try:
        return make(index)
    except UserError as error:
        return _Failure(str(error), is_users=True)
    except Exception:
        return _Failure(traceback.format_exc(), is_users=False)


def from_workers(pool: WorkerPool, indices: Iterable[Any]) -> Generator[Any]:
    """A pass of a pool that ends with it."""
    try:
        yield from pool.run(indices)
    finally:
        pool.close()


def from_thread(make: Make, indices: Iterable[Any], *, prefetch: int) -> Generator[Any]:
    """`make(index)` for each index, made by a thread that runs ahead; its exceptions are raised here."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=prefetch)
    stopped = threading.Event()
    end = object()

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for index in indices:
                if stopped.is_set():
                    return
                put(make(index))
            put(end)
        except BaseException as error:
            put(error)

    threading.Thread(target=produce, name="data-loader", daemon=True).start()
    try:
        while (item := ready.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
