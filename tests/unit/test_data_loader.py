"""Every rank count sees the same batches, a run resumes anywhere, and a worker's error is readable."""

import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mm1.config import MM1Config
from megatron_mm1.data.balance import Dealer
from megatron_mm1.data.batch import IGNORE, PackedBatch
from megatron_mm1.data.loader import open_source, train_batches, training_plan, validation_batches
from megatron_mm1.data.tokenizer import Tokenizer
from megatron_mm1.errors import UserError
from tests.corpora import page_documents, small_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


def stream(config: MM1Config, count: int, **place: object) -> list[PackedBatch]:
    place = {"dp_rank": 0, "dp_size": 1} | place
    batches = train_batches(config, tokenizer=Tokenizer(config.data.tokenizer), **place)  # type: ignore[arg-type]
    taken = list(itertools.islice(batches, count))
    batches.close()  # type: ignore[attr-defined]
    return taken


def held_out(config: MM1Config, **place: object) -> dict[str, list[PackedBatch]]:
    place = {"dp_rank": 0, "dp_size": 1} | place
    starts = validation_batches(config, tokenizer=Tokenizer(config.data.tokenizer), **place)  # type: ignore[arg-type]
    return {name: list(start()) for name, start in starts.items()}


def same(first: PackedBatch, second: PackedBatch) -> bool:
    """Equal bit for bit, pixels included."""
    tensors = [field.name for field in fields(PackedBatch) if field.name not in ("images", "boundaries")]
    return (
        all(torch.equal(getattr(first, name), getattr(second, name)) for name in tensors)
        and len(first.images) == len(second.images)
        and all(
            torch.equal(a.slots, b.slots) and torch.equal(a.pixels, b.pixels)
            for a, b in zip(first.images, second.images, strict=True)
        )
    )


def all_same(first: list[PackedBatch], second: list[PackedBatch]) -> bool:
    return len(first) == len(second) and all(itertools.starmap(same, zip(first, second, strict=True)))


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_data_parallel_size(folder: Path, dp_size: int) -> None:
    """Four microbatches each, which the ranks share out among themselves."""
    config = small_config(folder)
    in_order, each = stream(config, 12), 4 // dp_size
    ranks = [stream(config, 3 * each, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for number in range(3):
        together = [batch for rank in ranks for batch in rank[number * each : (number + 1) * each]]
        for expected in in_order[number * 4 : (number + 1) * 4]:
            together.pop(next(place for place, batch in enumerate(together) if same(batch, expected)))
        assert not together


@pytest.mark.parametrize("dp_size", [2, 4])
def test_ranks_get_the_images_that_the_plan_deals_them(folder: Path, dp_size: int) -> None:
    config = small_config(folder)
    dealer = Dealer.of(config, training_plan(config, tokenizer=Tokenizer(config.data.tokenizer)), dp_size=dp_size)
    each, planned = 4 // dp_size, [dealer.images_per_rank(number).tolist() for number in range(10)]
    for rank in range(dp_size):
        batches = stream(config, 10 * each, dp_rank=rank, dp_size=dp_size, with_pixels=False)
        got = [sum(batch.num_images for batch in batches[first : first + each]) for first in range(0, 10 * each, each)]
        assert got == [images[rank] for images in planned]
    assert max(max(images) for images in planned) > 4


@pytest.mark.parametrize("consumed", [8, 16, 48])
@pytest.mark.parametrize("dp_size", [1, 2])
def test_resumed_stream_continues_the_uninterrupted_one(folder: Path, consumed: int, dp_size: int) -> None:
    config = small_config(folder)
    place, before = {"dp_rank": dp_size - 1, "dp_size": dp_size}, consumed // (2 * dp_size)
    whole = stream(config, before + 3, **place)
    assert all_same(whole[before:], stream(config, 3, consumed_sequences=consumed, **place))


def test_stream_does_not_start_inside_a_global_batch(folder: Path) -> None:
    with pytest.raises(UserError, match=r"consumed_sequences 14 is not a multiple of training.global_batch_size 8"):
        stream(small_config(folder), 1, consumed_sequences=14)


def test_micro_batch_size_only_regroups_the_sequences(folder: Path) -> None:
    config = small_config(folder)
    pairs = stream(config, 4)
    single = stream(replace(config, training=replace(config.training, micro_batch_size=1)), 8)
    for name in ("tokens", "labels", "segment_ids", "source_ids"):
        joined = [torch.cat([getattr(batch, name) for batch in batches]) for batches in (pairs, single)]
        assert torch.equal(*joined)


def test_workers_give_what_the_thread_gives(folder: Path) -> None:
    assert all_same(stream(small_config(folder), 6), stream(small_config(folder, num_workers=2), 6))


def test_rank_without_pixels_has_everything_else(folder: Path) -> None:
    config = small_config(folder)
    for with_pixels, without in zip(stream(config, 4), stream(config, 4, with_pixels=False), strict=True):
        assert torch.equal(with_pixels.labels, without.labels)
        assert [group.slots.tolist() for group in with_pixels.images] == [
            group.slots.tolist() for group in without.images
        ]
        assert all(group.pixels is None for group in without.images)


def test_every_token_of_a_source_is_seen_once_per_epoch(folder: Path) -> None:
    config = small_config(folder)
    tokenizer = Tokenizer(config.data.tokenizer)
    for source in training_plan(config, tokenizer=tokenizer).sources:
        for epoch in (0, 1):
            seen: Counter[int] = Counter()
            for index in range(epoch * len(source), (epoch + 1) * len(source)):
                for document, start, stop in source.sequence(index):
                    seen.update(range(start + 1_000_000 * document, stop + 1_000_000 * document))
            tokens = source.source.num_tokens
            assert seen == Counter(n + 1_000_000 * d for d in range(len(tokens)) for n in range(tokens[d]))


def test_epochs_differ_in_order(folder: Path) -> None:
    config = small_config(folder)
    captions, _ = training_plan(config, tokenizer=Tokenizer(config.data.tokenizer)).sources
    epochs = [[captions.sequence(epoch * len(captions) + n) for n in range(len(captions))] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])


def test_sequences_respect_the_limits(folder: Path) -> None:
    config = small_config(folder)
    for batch in stream(config, 20):
        images = np.zeros(2, int)
        for group in batch.images:
            np.add.at(images, (group.slots[:, 0] // config.data.seq_length).numpy(), 1)
        assert images.max() <= config.data.max_images_per_sequence
        assert batch.tokens.shape == (2, config.data.seq_length)


def test_text_only_sees_the_same_examples_without_their_images(folder: Path) -> None:
    blind, sighted = small_config(folder, text_only=True), small_config(folder)
    image_id = Tokenizer(blind.data.tokenizer).image_id
    for without, batch in zip(stream(blind, 10), stream(sighted, 10), strict=True):
        assert without.images == ()
        for row in range(batch.tokens.shape[0]):
            text = batch.tokens[row][(batch.tokens[row] != image_id) & (batch.segment_ids[row] > 0)]
            assert torch.equal(without.tokens[row][without.segment_ids[row] > 0], text)
    plans = [training_plan(config, tokenizer=Tokenizer(config.data.tokenizer)) for config in (blind, sighted)]
    assert plans[0].fingerprint == plans[1].fingerprint


@pytest.mark.parametrize("dp_size", [2, 3, 4])
def test_validation_set_does_not_depend_on_the_data_parallel_size(folder: Path, dp_size: int) -> None:
    config = small_config(folder)
    alone = held_out(config)
    ranks = [held_out(config, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for name, batches in alone.items():
        assert len({len(rank[name]) for rank in ranks}) == 1
        together = [batch for turn in zip(*(rank[name] for rank in ranks), strict=True) for batch in turn]
        assert all_same(batches, together[: len(batches)])
        assert all((batch.labels == IGNORE).all() for batch in together[len(batches) :])


def test_validation_repeats_itself_and_counts_no_sequence_twice(folder: Path) -> None:
    config = small_config(folder)
    config = replace(config, training=replace(config.training, eval_iters=50))
    tokenizer = Tokenizer(config.data.tokenizer)
    starts = validation_batches(config, tokenizer=tokenizer, dp_rank=0, dp_size=1)
    for number, source in enumerate(config.data.validation):
        batches = list(starts[source.name]())
        assert all_same(batches, list(starts[source.name]()))
        assert len(batches) == 50
        assert {int(n) for batch in batches for n in batch.source_ids.unique()} == {number}
        packed = open_source(config, source, tokenizer=tokenizer)
        trained = sum(int((batch.labels[row] != IGNORE).any()) for batch in batches for row in range(2))
        assert trained <= len(packed)


def test_validation_worker_serves_one_source_after_another(folder: Path) -> None:
    thread, worker = held_out(small_config(folder)), held_out(small_config(folder, num_workers=2))
    assert thread.keys() == worker.keys() == {"captions", "pages"}
    assert all(all_same(thread[name], worker[name]) for name in thread)


def test_abandoned_validation_pass_does_not_leak_into_the_next(folder: Path) -> None:
    config = small_config(folder, num_workers=1)
    starts = validation_batches(config, tokenizer=Tokenizer(config.data.tokenizer), dp_rank=0, dp_size=1)
    next(starts["captions"]())
    assert all_same(list(starts["pages"]()), held_out(small_config(folder))["pages"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_on_the_way_reaches_the_caller_in_one_line(folder: Path, num_workers: int, tmp_path: Path) -> None:
    """An image of 128 positions in sequences of 64 is found while planning; one that breaks later, in the worker."""
    with pytest.raises(UserError, match="an image takes 128 tokens"):
        config = small_config(folder, num_workers=num_workers)
        connector = replace(config.model.connector, tokens_per_image=128)
        stream(replace(config, model=replace(config.model, connector=connector)), 1)
    config = small_config(folder, num_workers=num_workers)
    tokenizer = Tokenizer(config.data.tokenizer)
    plan = training_plan(config, tokenizer=tokenizer)
    for source in plan.sources:
        source.source = Unreadable(source.source.fingerprint)  # type: ignore[assignment]
    with pytest.raises(UserError) as caught:
        next(train_batches(config, tokenizer=tokenizer, dp_rank=0, dp_size=1, plan=plan))
    assert str(caught.value) == "cannot read the disk"


class Unreadable:
    """A source whose disk went away."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint

    def piece(self, *where: int) -> None:
        raise UserError("cannot read the disk")


def test_closing_the_stream_ends_its_thread(folder: Path) -> None:
    def loaders() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "data-loader"]

    config = small_config(folder)
    batches: Iterator[PackedBatch] = train_batches(
        config, tokenizer=Tokenizer(config.data.tokenizer), dp_rank=0, dp_size=1
    )
    next(batches)
    mine = loaders()
    assert mine
    batches.close()  # type: ignore[attr-defined]
    for thread in mine:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in mine)


def test_vocabulary_smaller_than_the_tokenizer(folder: Path) -> None:
    config = small_config(folder)
    decoder = replace(config.model.decoder, vocab_size=300)
    with pytest.raises(UserError, match=r"320 pieces, model.decoder.vocab_size is 300"):
        stream(replace(config, model=replace(config.model, decoder=decoder)), 1)


def test_long_documents_are_cut_not_lost(folder: Path) -> None:
    """The corpus is worth its name: some of its documents do not fit a sequence."""
    config = small_config(folder)
    _, pages = training_plan(config, tokenizer=Tokenizer(config.data.tokenizer)).sources
    assert len(pages.source) == len(page_documents(40, seed=1))
    assert (pages.source.lengths(4) > config.data.seq_length).any()
