"""Batches for the trainer: the plan's sequences, decoded by worker processes or a thread ahead of time.

Microbatch j of a run holds the plan's sequences from j * micro_batch_size on. Those of a global batch are dealt out to
the data-parallel ranks by their images (`data.balance`): every data-parallel size sees the same global batches, and a
run resumes from the number of sequences it has consumed.
"""

import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset

from megatron_mm1.config.schema import MM1Config, SourceConfig
from megatron_mm1.data.assemble import Assembler, Row
from megatron_mm1.data.balance import Dealer
from megatron_mm1.data.batch import PackedBatch
from megatron_mm1.data.images import ImageProcessor
from megatron_mm1.data.mixture import PackedSource, PackingLimits, Plan
from megatron_mm1.data.source import IndexedSource
from megatron_mm1.data.tokenizer import Tokenizer
from megatron_mm1.errors import UserError

_PREFETCH = 2
"""Microbatches that each worker, or the thread, keeps ready."""


def packing_limits(config: MM1Config) -> PackingLimits:
    """What a sequence of this run holds."""
    return PackingLimits(
        seq_length=config.data.seq_length,
        max_images=config.data.max_images_per_sequence,
        tokens_per_image=config.model.connector.tokens_per_image,
        lookahead=config.data.packing_lookahead,
    )


def open_source(config: MM1Config, source: SourceConfig, *, tokenizer: Tokenizer) -> PackedSource:
    """Open and pack one source.

    Raises:
        UserError: it is missing or damaged, was prepared with another tokenizer, or the tokenizer has too many pieces.
    """
    if tokenizer.vocab_size > config.model.decoder.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} pieces, model.decoder.vocab_size is "
            f"{config.model.decoder.vocab_size}: raise it to at least {tokenizer.vocab_size}"
        )
    indexed = IndexedSource(source.path, tokenizer_fingerprint=tokenizer.fingerprint)
    return PackedSource(source.name, indexed, limits=packing_limits(config), seed=config.data.seed)


def training_plan(config: MM1Config, *, tokenizer: Tokenizer) -> Plan:
    """The order of training; its `fingerprint` names it."""
    return Plan(
        [open_source(config, source, tokenizer=tokenizer) for source in config.data.sources],
        weights=[source.weight for source in config.data.sources],
        limits=packing_limits(config),
        seed=config.data.seed,
    )


def train_batches(
    config: MM1Config,
    *,
    tokenizer: Tokenizer,
    dp_rank: int,
    dp_size: int,
    consumed_sequences: int = 0,
    with_pixels: bool = True,
    plan: Plan | None = None,
) -> Iterator[PackedBatch]:
    """This rank's microbatches, without end; close the iterator to stop its workers.

    Args:
        consumed_sequences: sequences of the plan that the run has used on all ranks together, a whole number of global
            batches.
        with_pixels: decode images; without, batches have their slots and no pixels.
        plan: `training_plan(config, ..)` where the caller has it already.

    Raises:
        UserError: see `open_source`, also from inside a worker; or consumed_sequences ends inside a global batch.
    """
    done, rest = divmod(consumed_sequences, config.training.global_batch_size)
    if rest:
        raise UserError(
            f"consumed_sequences {consumed_sequences} is not a multiple of training.global_batch_size "
            f"{config.training.global_batch_size}: a run resumes between steps, with the global batch size it had"
        )
    plan = plan or training_plan(config, tokenizer=tokenizer)
    batches = _TrainingBatches(
        plan=plan,
        assembler=_assembler(config, tokenizer=tokenizer, with_pixels=with_pixels),
        micro_batch_size=config.training.micro_batch_size,
    )
    dealer = Dealer.of(config, plan, dp_size=dp_size)
    indices = itertools.chain.from_iterable(map(partial(dealer.microbatches, dp_rank=dp_rank), itertools.count(done)))
    if config.data.num_workers and with_pixels:
        return _from_workers(_worker_loader(batches, indices, num_workers=config.data.num_workers))
    return _from_thread(batches, indices)


def validation_batches(
    config: MM1Config, *, tokenizer: Tokenizer, dp_rank: int, dp_size: int, with_pixels: bool = True
) -> dict[str, Callable[[], Iterator[PackedBatch]]]:
    """For each validation source, a function that starts a pass over its first eval_iters microbatches.

    The microbatches are the same whatever `dp_size`, and every rank gets equally many: where they run out (the source
    is too small, or dp_size does not divide eval_iters) a sequence is repeated without labels. `source_ids` count
    the validation sources. Use one pass at a time: they share one worker.
    """
    sources = [open_source(config, source, tokenizer=tokenizer) for source in config.data.validation]
    batches = _ValidationBatches(
        sources=sources,
        assembler=_assembler(config, tokenizer=tokenizer, with_pixels=with_pixels),
        micro_batch_size=config.training.micro_batch_size,
        eval_iters=config.training.eval_iters,
    )
    indices = _Indices()
    loader = None
    if config.data.num_workers and with_pixels and sources:
        loader = _worker_loader(batches, indices, num_workers=1)

    def start(source: int) -> Iterator[PackedBatch]:
        rounds = -(-config.training.eval_iters // dp_size)
        mine = [(source, round_ * dp_size + dp_rank) for round_ in range(rounds)]
        if loader is None:
            return _from_thread(batches, mine)
        indices.values = mine
        return _from_workers(loader)

    return {source.name: partial(start, number) for number, source in enumerate(sources)}


def _assembler(config: MM1Config, *, tokenizer: Tokenizer, with_pixels: bool) -> Assembler:
    vision = config.model.vision
    processor = ImageProcessor(vision.image_size, vision.image_mean, vision.image_std) if with_pixels else None
    return Assembler(
        seq_length=config.data.seq_length,
        tokens_per_image=config.model.connector.tokens_per_image,
        image_id=tokenizer.image_id,
        pad_id=tokenizer.pad_id,
        image_size=vision.image_size,
        text_only=config.data.text_only,
        processor=processor,
    )


@dataclass(frozen=True)
class _TrainingBatches(Dataset):
    plan: Plan
    assembler: Assembler
    micro_batch_size: int

    def __getitem__(self, microbatch: int) -> PackedBatch:
        first = microbatch * self.micro_batch_size
        rows = []
        for index in range(first, first + self.micro_batch_size):
            source, own = self.plan.locate(index)
            rows.append(Row(source, self.plan.sources[source].pieces(own)))
        return self.assembler(rows)


@dataclass(frozen=True)
class _ValidationBatches(Dataset):
    sources: Sequence[PackedSource]
    assembler: Assembler
    micro_batch_size: int
    eval_iters: int

    def __getitem__(self, key: tuple[int, int]) -> PackedBatch:
        number, microbatch = key
        source = self.sources[number]
        end = min(len(source), self.eval_iters * self.micro_batch_size)
        first = microbatch * self.micro_batch_size
        return self.assembler(
            [
                Row(number, source.pieces(index % end), trained=index < end)
                for index in range(first, first + self.micro_batch_size)
            ]
        )


class _Indices:
    """What a loader visits next: set before each pass."""

    values: Sequence[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)


@dataclass(frozen=True)
class _Failure:
    """A user's error on its way out of a worker (the loader would wrap a raised one into a traceback)."""

    message: str


@dataclass(frozen=True)
class _Guarded(Dataset):
    dataset: Dataset

    def __getitem__(self, index: Any) -> PackedBatch | _Failure:
        try:
            return self.dataset[index]
        except UserError as error:
            return _Failure(str(error))


def _itself(batch: Any) -> Any:
    return batch


def _without_gpus(worker: int) -> None:
    """Workers decode on the CPU, but DALI opens a context on the first GPU it sees, and a pool of a thread per core."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("DALI_NUM_THREADS", "1")


def _worker_loader(dataset: Dataset, indices: Iterable[Any], *, num_workers: int) -> DataLoader:
    """Worker processes are spawned, not forked: a fork after DALI or CUDA was used hangs."""
    return DataLoader(
        _Guarded(dataset),
        batch_size=None,
        sampler=indices,
        num_workers=num_workers,
        collate_fn=_itself,
        multiprocessing_context="spawn",
        worker_init_fn=_without_gpus,
        prefetch_factor=_PREFETCH,
        persistent_workers=True,
    )


def _from_workers(loader: DataLoader) -> Iterator[PackedBatch]:
    for batch in loader:
        if isinstance(batch, _Failure):
            raise UserError(batch.message)
        yield batch


def _from_thread(dataset: Dataset, indices: Iterable[Any]) -> Iterator[PackedBatch]:
    """`dataset[i]` for each index, made by a thread that runs ahead; its exceptions are raised here."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=_PREFETCH)
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
                put(dataset[index])
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
