"""The processes that prepare parts of a data set side by side."""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_mm1.data.prepared import part_name
from megatron_mm1.data.preparing import Checks, write_part
from megatron_mm1.data.processes import end_with_parent, use_one_core
from megatron_mm1.data.readers import Reader, Shard, open_reader
from megatron_mm1.data.tokenizer import Tokenizer, open_tokenizer
from megatron_mm1.errors import UserError

_POLL = 0.2
"""Seconds between looks at how far the processes are."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a process opens what it needs."""

    reader: str
    input: Path
    options: tuple[tuple[str, str], ...] = ()
    tokenizer: Path

    def open_reader(self) -> Reader:
        return open_reader(self.reader, self.input, dict(self.options), tokenizer=self.tokenizer)


def write_in_processes(
    recipe: Recipe,
    checks: Checks,
    work: Path,
    parts: Mapping[int, Sequence[Shard]],
    *,
    workers: int,
    done: Callable[[int], None],
) -> None:
    """Processes are spawned: a fork after DALI was used hangs."""
    if not parts:
        return
    context = multiprocessing.get_context("spawn")
    read = context.Value("q", 0)
    told = 0
    with ProcessPoolExecutor(
        min(workers, len(parts)), mp_context=context, initializer=_start_worker, initargs=(read,)
    ) as processes:
        waiting: set[Future[None]] = {
            processes.submit(_write_one, recipe, checks, work / part_name(number), list(shards))
            for number, shards in parts.items()
        }
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=_POLL, return_when=FIRST_COMPLETED)
                done(read.value - told)
                told = read.value
                for future in finished:
                    future.result()
        except BrokenProcessPool:
            raise UserError(
                f"a process that was preparing {work} ended without a word, as when memory runs out: run the same "
                "command again, which goes on with what is there, with fewer --workers"
            ) from None
        finally:
            processes.shutdown(cancel_futures=True)


_READ: list[Any] = []
"""In a worker process: the bytes that all workers have read."""


def _start_worker(read: Any) -> None:
    end_with_parent()  # or it would write parts beside a second run
    use_one_core()
    _READ[:] = [read]


@cache
def _tools(recipe: Recipe) -> tuple[Reader, Tokenizer]:
    return recipe.open_reader(), open_tokenizer(recipe.tokenizer)


def _write_one(recipe: Recipe, checks: Checks, folder: Path, shards: Sequence[Shard]) -> None:
    def done(size: int) -> None:
        with _READ[0].get_lock():
            _READ[0].value += size

    reader, tokenizer = _tools(recipe)
    write_part(folder, reader, shards, tokenizer=tokenizer, checks=checks, done=done)
