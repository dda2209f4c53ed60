"""Batches for the trainer: the plan's sequences, decoded by worker processes or a thread ahead of time.

Microbatch j of a run holds the plan's sequences from j * micro_batch_size on. Those of a global batch are dealt out to
the data-parallel ranks by their images (`data.balance`): every data-parallel size sees the same global batches, and a
run resumes from the number of sequences it has consumed.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice

import numpy as np

from megatron_mm1.config.batch_sizes import BatchSizes
from megatron_mm1.config.schema import MM1Config
from megatron_mm1.data.assemble import Assembler, Row
from megatron_mm1.data.balance import Dealer
from megatron_mm1.data.batch import PackedBatch
from megatron_mm1.data.images import ImageProcessor
from megatron_mm1.data.images.augmentation import RandomResizedCrop
from megatron_mm1.data.images.device import DeviceProcessor, check_gpu_decoder
from megatron_mm1.data.mixture import Plan
from megatron_mm1.data.plan import Sources, TrainingData, packed_alone, training_data
from megatron_mm1.data.pools import PackedStream, PieceOf
from megatron_mm1.data.source import Piece
from megatron_mm1.data.tokenizer import Tokenizer
from megatron_mm1.data.workers import WorkerPool, from_thread, from_workers


@dataclass(frozen=True)
class PlannedRow:
    """A sequence to be read.

    Attributes:
        pieces: of documents, in order.
        trained, index: see `Row`.
    """

    pieces: Sequence[PieceOf]
    trained: bool = True
    index: int | None = None


def train_batches(
    config: MM1Config,
    *,
    tokenizer: Tokenizer,
    dp_rank: int,
    dp_size: int,
    consumed_sequences: int = 0,
    with_pixels: bool = True,
    data: TrainingData | None = None,
) -> Generator[PackedBatch]:
    """This rank's microbatches, without end; close the iterator to stop its workers.

    Args:
        consumed_sequences: sequences of the plan that the run has used on all ranks together, a whole number of global
            batches.
        with_pixels: decode images, where this rank encodes them; without, batches are the same but for the pixels.
        data: `training_data(config, ..)` where the caller has it already.

    Raises:
        UserError: see `training_data`, also from inside a worker; consumed_sequences ends inside a global batch; images
            are to be decoded on a GPU and there is none; or workers die over and over.
    """
    done = BatchSizes.of(config.training).steps_taken(consumed_sequences)
    on_gpu = with_pixels and config.data.image_decoder == "gpu" and not config.data.text_only
    if on_gpu:
        check_gpu_decoder()
    data = data or training_data(config, tokenizer=tokenizer)
    processor = ImageProcessor.of(config) if with_pixels else None
    fills = DeviceProcessor(processor) if processor and on_gpu else processor
    assembler = Assembler.of(config, tokenizer, processor=fills)
    if shares := config.data.random_resized_crop:
        assembler = replace(assembler, crop=RandomResizedCrop(*shares, seed=config.data.seed))
    read = _Batches(data.sources, assembler)
    dealer = Dealer.of(config, data.plan, dp_size=dp_size)
    microbatches = chain.from_iterable(map(partial(dealer.microbatches, dp_rank=dp_rank), count(done)))
    planned = map(partial(_planned, data.plan, config.training.micro_batch_size), microbatches)
    if config.data.num_workers and with_pixels:
        return from_workers(_pool(config, read, num_workers=config.data.num_workers), planned)
    return from_thread(read, planned, prefetch=config.data.prefetch_factor)


def _planned(plan: Plan, micro_batch_size: int, microbatch: int) -> list[PlannedRow]:
    first = microbatch * micro_batch_size
    return [PlannedRow(plan.sequence(index), index=index) for index in range(first, first + micro_batch_size)]


def validation_batches(
    config: MM1Config, *, tokenizer: Tokenizer, dp_rank: int, dp_size: int, with_pixels: bool = True
) -> dict[str, Callable[[], Iterator[PackedBatch]]]:
    """For each validation source, a function that starts a pass over its first eval_iters microbatches.

    The microbatches are the same whatever `dp_size`, and every rank gets equally many: where they run out (the source
    is too small, or dp_size does not divide eval_iters) a sequence is repeated without labels. `source_ids` count
    the validation sources. Use one pass at a time: they share one worker.
    """
    sources = Sources(config, config.data.validation, tokenizer=tokenizer)
    streams = [packed_alone(config, sources, number) for number in range(len(sources))]
    processor = ImageProcessor.of(config) if with_pixels else None
    read = _Batches(sources, Assembler.of(config, tokenizer, processor=processor))
    micro_batch_size, eval_iters = config.training.micro_batch_size, config.training.eval_iters
    pool = _pool(config, read, num_workers=1) if config.data.num_workers and with_pixels else None

    def rows(stream: PackedStream, microbatch: int) -> list[PlannedRow]:
        end = min(len(stream), eval_iters * micro_batch_size)
        first = microbatch * micro_batch_size
        indices = range(first, first + micro_batch_size)
        return [PlannedRow(stream.sequence(index % end), trained=index < end) for index in indices]

    def start(stream: PackedStream) -> Iterator[PackedBatch]:
        rounds = -(-eval_iters // dp_size)
        mine = (rows(stream, round_ * dp_size + dp_rank) for round_ in range(rounds))
        return from_thread(read, mine, prefetch=config.data.prefetch_factor) if pool is None else pool.run(mine)

    return {name: partial(start, stream) for name, stream in zip(sources.names, streams, strict=True)}


def _pool(config: MM1Config, read: "_Batches", *, num_workers: int) -> WorkerPool:
    data = config.data
    return WorkerPool(
        read, num_workers=num_workers, prefetch=data.prefetch_factor, max_restarts=data.max_worker_restarts
    )


@dataclass(frozen=True)
class _Batches:
    """Reads and assembles planned rows; the same rows give the same batch, in any process."""

    sources: Sources
    assembler: Assembler

    def __call__(self, rows: Sequence[PlannedRow]) -> PackedBatch:
        pieces = iter(self.sources.read([piece for row in rows for piece in row.pieces]))
        return self.assembler([self._row(row, list(islice(pieces, len(row.pieces)))) for row in rows])

    def _row(self, row: PlannedRow, pieces: Sequence[Piece]) -> Row:
        numbers = [piece.source for piece in row.pieces]
        plain = Row(numbers, pieces, trained=row.trained, index=row.index)
        if self.assembler.image_tokens.tiling.kind == "none":
            return plain
        tilings = [self._tiling(of, piece) for of, piece in zip(row.pieces, pieces, strict=True)]
        return replace(plain, first_images=[first for first, _ in tilings], grids=[grids for _, grids in tilings])

    def _tiling(self, of: PieceOf, piece: Piece) -> tuple[int, np.ndarray]:
        """How many images a piece's document has before it, and the grids [n, 2] of its own: where the document is cut
        makes no difference to them."""
        positions, _ = self.sources[of.source].images_of(np.array([of.document]))
        grids = self.assembler.image_tokens.tiling.grids(np.array(piece.sizes), num_images=len(positions))
        return int((positions < of.start).sum()), grids
