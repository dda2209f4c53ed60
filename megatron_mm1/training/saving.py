"""Writing checkpoints while training goes on.

A save copies the state into host memory, which is all that training waits for, and a thread of each rank writes the
copy. Between steps the ranks ask each other whether all have written; then rank 0 puts the checkpoint in its place.
"""

import queue
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor

from megatron_mm1.checkpoint.format import (
    CheckpointMetadata,
    FileRecord,
    begin,
    commit,
    find_checkpoint,
    prune,
    record_of,
    sweep,
)
from megatron_mm1.errors import UserError
from megatron_mm1.parallel.device import device


@dataclass
class _Pending:
    """A save under way."""

    partial: Path
    metadata: CheckpointMetadata
    strategy: "_Strategy"
    thread: threading.Thread = field(init=False)
    error: str | None = None
    records: dict[str, FileRecord] = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)


class CheckpointSaver:
    """Saves one checkpoint at a time into `folder`; every rank makes one and calls the same methods.

    Args:
        folder: of the checkpoints.
        asynchronous: let training go on while a checkpoint is written.
        keep_last: how many of the newest stay; None: all.
        keep_every: checkpoints of multiples of so many steps stay anyway.
        max_failures: consecutive saves that may fail; the next failure ends the run.
        say: prints a line.
    """

    def __init__(
        self,
        folder: Path,
        *,
        asynchronous: bool = False,
        keep_last: int | None = None,
        keep_every: int | None = None,
        max_failures: int = 0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder, self.asynchronous, self.say = folder, asynchronous, say
        self.keep_last, self.keep_every = keep_last, keep_every
        self.failures, self.max_failures = 0, max_failures
        self._pending: _Pending | None = None
        self._copies: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._validated = False

    def save(self, metadata: CheckpointMetadata, state: dict[str, Any]) -> None:
        """Begin to write a checkpoint, after the one under way if there is one.

        Args:
            metadata: what the checkpoint is; rank 0's is written.
            state: this rank's part, as `training_state` describes it; free to change once this returns.

        Raises:
            UserError: saving has failed more often than it may.
        """
        self.wait()
        partial, error = _on_rank_0(lambda: self._begin(metadata.iteration))
        if error:
            return self._failed(error)
        apply_factories(state)
        self._copy(state)
        pending = _Pending(partial, metadata, _Strategy())
        # Collectives among the ranks, once per process: nothing that it looks at changes between saves.
        dist_checkpointing.save(
            state,
            str(partial),
            pending.strategy,
            validate_access_integrity=not self._validated,
            async_sharded_save=True,
            async_strategy="mcore",
        )
        self._validated = True
        self._pending = pending
        pending.thread = threading.Thread(target=_write, args=(pending,), name="checkpoint", daemon=True)
        pending.thread.start()
        if not self.asynchronous:
            self.wait()
            self._copies.clear()

    def poll(self) -> None:
        """Finish the save under way if every rank has written its part; call it between steps.

        Raises:
            UserError: saving has failed more often than it may.
        """
        if self._pending is None:
            return
        written = torch.tensor([not self._pending.thread.is_alive()], dtype=torch.int32, device=device())
        torch.distributed.all_reduce(written, op=torch.distributed.ReduceOp.MIN)
        if written.item():
            self._finish()

    def wait(self) -> None:
        """Finish the save under way.

        Raises:
            UserError: saving has failed more often than it may.
        """
        if self._pending is not None:
            self._pending.thread.join()
            self._finish()

    def _begin(self, iteration: int) -> Path:
        sweep(self.folder)
        return begin(self.folder, iteration)

    def _copy(self, state: dict[str, Any]) -> None:
        """Replace the tensors that this rank writes by copies in host memory, which the next save uses again."""
        for part in nested_values(state):
            if isinstance(part, ShardedTensor) and is_main_replica(part.replica_id):
                place = part.key, part.global_offset
                copy = self._copies.get(place)
                if copy is None:
                    pinned = part.data.is_cuda
                    copy = self._copies[place] = torch.empty(part.data.shape, dtype=part.dtype, pin_memory=pinned)
                copy.copy_(part.data.detach(), non_blocking=True)
                part.data = copy
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        assert pending is not None
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (pending.error, pending.records, pending.results))
        errors = [f"rank {rank}: {error}" for rank, (error, _, _) in enumerate(parts) if error]

        def put_in_place() -> Path:
            if errors:
                raise OSError("; ".join(errors))
            pending.strategy.write_metadata(pending.partial, [results for _, _, results in parts])
            records = {name: record for _, records, _ in parts for name, record in records.items()}
            return commit(pending.partial, pending.metadata, records)

        path, error = _on_rank_0(put_in_place)
        if error:
            _on_rank_0(lambda: shutil.rmtree(pending.partial, ignore_errors=True))
            return self._failed(f"{pending.partial}: {error}")
        self.failures = 0
        self.say(f" saved {path}")
        if (keep_last := self.keep_last) is not None:
            removed, error = _on_rank_0(lambda: prune(self.folder, keep_last, keep_every=self.keep_every))
            if removed or error:
                self.say(f" removed {', '.join(removed)}" if removed else f" could not remove old checkpoints: {error}")

    def _failed(self, error: str) -> None:
        self.failures += 1
        if self.failures > self.max_failures:
            raise UserError(
                f"no checkpoint was saved: {error} "
                "(the checkpoints before it are whole; free space or mend permissions and go on)"
            )
        more = self.max_failures - self.failures
        self.say(f" no checkpoint was saved: {error}; training goes on, {more} more may fail in a row")


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron-core's plan of a save, taken out of its hands before the parts that would leave other ranks waiting for
    one that has failed."""

    def _get_save_and_finalize_callbacks(self, writer: Any, saved: Any, async_strategy: str) -> Any:
        self.writer, self.global_metadata = writer, saved[1]
        return super()._get_save_and_finalize_callbacks(writer, saved, async_strategy)

    def write(self) -> list[Any]:
        """Write this rank's files; returns where in them its tensors lie."""
        results: list[Any] = []
        for number, bucket in enumerate(self.writer.write_buckets):
            _, written = self.writer.write_preloaded_data(
                [self.writer.transforms], number, bucket, None, None, use_fsync=True
            )
            if isinstance(written, Exception):
                raise written
            results += written
        return results

    def write_metadata(self, folder: Path, results: list[Any]) -> None:
        """On rank 0: the files that make a folder of ranks' files a distributed checkpoint."""
        self.writer.finish(self.global_metadata, results)
        save_config(CheckpointingConfig(self.backend, self.version), str(folder))


# In place of a queue between processes, for which megatron-core would start one: nothing is passed through it here.
filesystem_async._results_queue = queue.Queue()


def _write(pending: _Pending) -> None:
    """In the thread: this rank's files, and their checksums."""
    try:
        pending.results = pending.strategy.write()
        rank = torch.distributed.get_rank()
        pending.records = {path.name: record_of(path) for path in pending.partial.glob(f"__{rank}_*.distcp")}
    except Exception as error:
        cause = _cause(error)
        pending.error = f"{type(cause).__name__}: {cause}"


def _cause(error: BaseException) -> BaseException:
    """What the system refused, which torch's writer covers with an error of its own; else the error itself."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found or error


def _on_rank_0(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """(result, error) of something that rank 0 does, on every rank."""
    outcome: list[Any] = [(None, None)]
    if torch.distributed.get_rank() == 0:
        try:
            outcome = [(action(), None)]
        except OSError as refusal:
            outcome = [(None, str(refusal))]
    torch.distributed.broadcast_object_list(outcome, src=0)
    result, error = outcome[0]
    return result, error


def save_checkpoint(folder: Path, metadata: CheckpointMetadata, state: dict[str, Any]) -> Path:
    """Write one checkpoint into `folder` and wait until it is in place; every rank takes part.

    Returns:
        The checkpoint's folder.
    """
    CheckpointSaver(folder).save(metadata, state)
    return find_checkpoint(folder)
