"""Every rank count sees the same batches, a run resumes anywhere, and a worker's error is readable."""

import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm1.config import MM1Config
from megatron_mm1.data import loader
from megatron_mm1.data.balance import Dealer
from megatron_mm1.data.batch import IGNORE, ImageGroup, PackedBatch
from megatron_mm1.data.image_tokens import tiling_of
from megatron_mm1.data.inspect.mixture import cost
from megatron_mm1.data.loader import train_batches, validation_batches
from megatron_mm1.data.plan import Sources, TrainingData, packed_alone, packing_limits, training_data
from megatron_mm1.data.tokenizer import open_tokenizer
from megatron_mm1.data.workers import WorkerPool, from_thread, from_workers
from megatron_mm1.errors import UserError
from tests.corpora import page_documents, small_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


def opened(config: MM1Config) -> TrainingData:
    return training_data(config, tokenizer=open_tokenizer(config.data.tokenizer))


def stream(config: MM1Config, count: int, **place: object) -> list[PackedBatch]:
    place = {"dp_rank": 0, "dp_size": 1} | place
    batches = train_batches(config, tokenizer=open_tokenizer(config.data.tokenizer), **place)  # type: ignore[arg-type]
    taken = list(itertools.islice(batches, count))
    batches.close()  # type: ignore[attr-defined]
    return taken


def held_out(config: MM1Config, **place: object) -> dict[str, list[PackedBatch]]:
    place = {"dp_rank": 0, "dp_size": 1} | place
    starts = validation_batches(config, tokenizer=open_tokenizer(config.data.tokenizer), **place)  # type: ignore[arg-type]
    return {name: list(start()) for name, start in starts.items()}


def content(batch: PackedBatch) -> dict[str, object]:
    """Every field of a batch, as bytes."""
    whole = {field.name: getattr(batch, field.name) for field in fields(PackedBatch) if field.name != "images"}
    for number, group in enumerate(batch.images):
        whole |= {f"images {number} {field.name}": getattr(group, field.name) for field in fields(ImageGroup)}
    return {
        name: (value.dtype, tuple(value.shape), value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value
        for name, value in whole.items()
    }


def same(first: PackedBatch, second: PackedBatch) -> bool:
    """Equal bit for bit, pixels included."""
    return content(first) == content(second)


def all_same(first: list[PackedBatch], second: list[PackedBatch]) -> bool:
    return len(first) == len(second) and all(itertools.starmap(same, zip(first, second, strict=True)))


TILED = {"image_tiling": "dynamic", "max_image_tiles": 2, "tile_indicators": True, "seq_length": 96}


@pytest.mark.parametrize(("dp_size", "data"), [(1, {}), (2, {}), (4, {}), (2, TILED), (4, TILED)])
def test_global_batches_do_not_depend_on_the_data_parallel_size(folder: Path, dp_size: int, data: dict) -> None:
    """Four microbatches each, which the ranks share out among themselves."""
    config = small_config(folder, **data)
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
    dealer = Dealer.of(config, opened(config).plan, dp_size=dp_size)
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


def digest(batches: list[PackedBatch]) -> str:
    """Of a global batch: over every field of its microbatches, in whatever order the ranks have them."""
    parts = sorted(hashlib.sha256(repr(content(batch)).encode()).hexdigest() for batch in batches)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def global_batches(config: MM1Config, *, first: int, count: int, dp_size: int) -> list[str]:
    each = config.training.global_batch_size // config.training.micro_batch_size // dp_size
    consumed = first * config.training.global_batch_size
    ranks = [
        stream(config, count * each, dp_rank=rank, dp_size=dp_size, consumed_sequences=consumed)
        for rank in range(dp_size)
    ]
    return [
        digest([batch for rank in ranks for batch in rank[step * each : (step + 1) * each]]) for step in range(count)
    ]


@settings(max_examples=4, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.sampled_from([0, 0, 1])), max_size=3),
    st.booleans(),
)
def test_stopping_and_resuming_anywhere_changes_nothing(
    folder: Path, legs: list[tuple[int, int, int]], crop: bool
) -> None:
    """Each leg of a run has its own number of steps, data-parallel size and number of workers."""
    config = small_config(folder, random_resized_crop=(0.3, 0.9) if crop else None)
    resumed: list[str] = []
    for steps, dp_size, num_workers in legs:
        leg = replace(config, data=replace(config.data, num_workers=num_workers))
        resumed += global_batches(leg, first=len(resumed), count=steps, dp_size=dp_size)
    assert resumed == global_batches(config, first=0, count=len(resumed), dp_size=1)
    assert len(set(resumed)) == len(resumed)


def test_ranks_that_share_sequences_build_equal_batches(folder: Path) -> None:
    """Tensor-parallel ranks do not send batches to each other."""
    first, second = (stream(small_config(folder, random_resized_crop=(0.3, 0.9)), 8) for _ in range(2))
    assert all_same(first, second)


def test_crops_are_for_training_only(folder: Path) -> None:
    cropping = small_config(folder, random_resized_crop=(0.2, 0.4))
    pairs = list(zip(stream(cropping, 4), stream(small_config(folder), 4), strict=True))
    assert not any(torch.equal(a.images[0].pixels, b.images[0].pixels) for a, b in pairs)
    assert all(torch.equal(a.images[0].slots, b.images[0].slots) for a, b in pairs)
    validation = held_out(cropping)
    assert all(all_same(validation[name], batches) for name, batches in held_out(small_config(folder)).items())


@pytest.mark.parametrize("num_workers", [1, 3])
def test_killed_worker_is_noticed_and_replaced(
    folder: Path, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    expected = stream(small_config(folder), 16)
    config = small_config(folder, num_workers=num_workers)
    batches = train_batches(config, tokenizer=open_tokenizer(config.data.tokenizer), dp_rank=0, dp_size=1)
    got = [next(batches) for _ in range(5)]
    victim = workers()[0].pid
    os.kill(victim, signal.SIGKILL)
    got += [next(batches) for _ in range(11)]
    batches.close()  # type: ignore[attr-defined]
    assert all_same(got, expected)
    assert (
        f"loader process {victim} died with exit code -9; another one starts where it stopped (1 of 3)" in caplog.text
    )
    assert not workers()


def workers() -> list[multiprocessing.process.BaseProcess]:
    return [process for process in multiprocessing.active_children() if process.name == "data-worker"]


def die(index: int) -> int:
    if index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return index


def test_worker_that_dies_again_and_again_ends_the_run(caplog: pytest.LogCaptureFixture) -> None:
    pool = WorkerPool(die, num_workers=2, prefetch=2, max_restarts=2)
    batches = from_workers(pool, range(9))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(UserError, match=r"loader processes died 3 times in a row \(the last with exit code -9\)"):
        next(batches)
    assert caplog.text.count("died with exit code -9") == 2
    assert not workers()


def divide(index: int) -> float:
    return 1 / index


def test_error_of_the_program_in_a_worker_comes_with_its_traceback() -> None:
    batches = from_workers(WorkerPool(divide, num_workers=1, prefetch=2, max_restarts=3), [1, 0])
    assert next(batches) == 1
    with pytest.raises(RuntimeError, match=r"(?s)in a loader process:.*ZeroDivisionError"):
        next(batches)


def test_prefetch_factor_bounds_what_is_made_ahead(folder: Path) -> None:
    made: list[int] = []
    batches = from_thread(lambda index: made.append(index) or index, range(100), prefetch=3)
    next(batches)
    time.sleep(0.3)
    assert made == list(range(5))  # one taken, three ready, one waiting for room
    batches.close()  # type: ignore[attr-defined]


def test_images_for_the_gpu_travel_encoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(folder, image_decoder="gpu")
    with pytest.raises(UserError, match="sees no CUDA device"):
        stream(config, 1)
    stream(config, 1, with_pixels=False)
    stream(small_config(folder, image_decoder="gpu", text_only=True), 1)
    monkeypatch.setattr(loader, "check_gpu_decoder", lambda: None)
    for encoded, decoded in zip(stream(config, 4), stream(small_config(folder), 4), strict=True):
        (theirs,), (ours,) = encoded.images, decoded.images
        assert theirs.pixels is None
        on_device, on_host = theirs.to(torch.device("cpu")).pixels, ours.to(torch.device("cpu")).pixels
        assert ((on_device - on_host).abs() * 255 * 0.2758).max() <= 2.01  # the largest standard deviation
        assert torch.equal(theirs.slots, ours.slots)


@pytest.mark.parametrize(("kind", "indicators"), [("overview_and_crops", False), ("dynamic", False), ("dynamic", True)])
def test_tiled_images_take_the_places_that_were_planned(folder: Path, kind: str, indicators: bool) -> None:
    """Also of documents that were cut: how many images the whole one has decides whether they are tiled."""
    config = small_config(folder, image_tiling=kind, max_image_tiles=2, seq_length=96, tile_indicators=indicators)
    data = opened(config)
    tiling = tiling_of(config)
    limits = packing_limits(config, open_tokenizer(config.data.tokenizer))
    seen = set()
    for index, batch in enumerate(stream(config, 40)):
        for row in range(2):
            (own,) = [group.slots[:, 0] // 96 == row for group in batch.images] or [torch.zeros(0)]
            assert int(own.sum()) == data.plan.num_images(2 * index + row) <= config.data.max_images_per_sequence
            pieces = data.plan.sequence(2 * index + row)
            planned = sum(cost(data.sources, limits, piece, text_only=False)[0] for piece in pieces)
            assert int((batch.segment_ids[row] > 0).sum()) == planned
            numbers = []  # of the image in its document, for each tile
            for piece in pieces:
                positions, sizes = data.sources[piece.source].images_of(np.array([piece.document]))
                inside = (positions >= piece.start) & (positions < piece.stop)
                tiles = tiling.tiles_of(sizes, len(sizes))[inside]
                numbers += np.repeat(np.flatnonzero(inside), tiles).tolist()
                seen.add(int(tiles.sum()))
            assert [k for group in batch.images for k in group.tile_index[own, 0].tolist()] == numbers
    assert len(seen) >= 2


def test_stream_does_not_start_inside_a_global_batch(folder: Path) -> None:
    with pytest.raises(UserError, match="consumed_sequences 14 is inside of step 1, which begins at 8"):
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


@pytest.mark.parametrize("data", [{}, TILED])
def test_rank_without_pixels_has_everything_else(folder: Path, data: dict) -> None:
    config = small_config(folder, **data)
    for with_pixels, without in zip(stream(config, 4), stream(config, 4, with_pixels=False), strict=True):
        assert torch.equal(with_pixels.labels, without.labels)
        assert torch.equal(with_pixels.tokens, without.tokens)
        assert [group.slots.tolist() for group in with_pixels.images] == [
            group.slots.tolist() for group in without.images
        ]
        assert all(group.pixels is None and group.normalization is None for group in without.images)


def test_every_token_of_a_source_is_seen_once_per_epoch(folder: Path) -> None:
    config = small_config(folder)
    data = opened(config)
    for number in range(2):
        stream = packed_alone(config, data.sources, number)
        tokens = data.sources[number].num_tokens(np.arange(len(data.sources[number])))
        for epoch in (0, 1):
            seen: Counter[int] = Counter()
            for index in range(epoch * len(stream), (epoch + 1) * len(stream)):
                for source, document, start, stop in stream.sequence(index):
                    assert source == number
                    seen.update(range(start + 1_000_000 * document, stop + 1_000_000 * document))
            assert seen == Counter(n + 1_000_000 * d for d in range(len(tokens)) for n in range(tokens[d]))


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
    image_id = open_tokenizer(blind.data.tokenizer).image_id
    for without, batch in zip(stream(blind, 10), stream(sighted, 10), strict=True):
        assert without.images == ()
        for row in range(batch.tokens.shape[0]):
            text = batch.tokens[row][(batch.tokens[row] != image_id) & (batch.segment_ids[row] > 0)]
            assert torch.equal(without.tokens[row][without.segment_ids[row] > 0], text)
    plans = [opened(config).plan for config in (blind, sighted)]
    assert all(plans[0].sequence(index) == plans[1].sequence(index) for index in range(50))
    assert plans[0].fingerprint() != plans[1].fingerprint()


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
    tokenizer = open_tokenizer(config.data.tokenizer)
    starts = validation_batches(config, tokenizer=tokenizer, dp_rank=0, dp_size=1)
    for number, source in enumerate(config.data.validation):
        batches = list(starts[source.name]())
        assert all_same(batches, list(starts[source.name]()))
        assert len(batches) == 50
        assert {int(n) for batch in batches for n in batch.source_ids.unique()} == {number}
        trained = sum(int((batch.labels[row] != IGNORE).any()) for batch in batches for row in range(2))
        sources = Sources(config, config.data.validation, tokenizer=tokenizer)
        assert trained <= len(packed_alone(config, sources, number))


def test_validation_worker_serves_one_source_after_another(folder: Path) -> None:
    thread, worker = held_out(small_config(folder)), held_out(small_config(folder, num_workers=2))
    assert thread.keys() == worker.keys() == {"captions", "pages"}
    assert all(all_same(thread[name], worker[name]) for name in thread)


def test_abandoned_validation_pass_does_not_leak_into_the_next(folder: Path) -> None:
    config = small_config(folder, num_workers=1)
    starts = validation_batches(config, tokenizer=open_tokenizer(config.data.tokenizer), dp_rank=0, dp_size=1)
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
    tokenizer = open_tokenizer(config.data.tokenizer)
    data = TrainingData(Unreadable(), opened(config).plan)  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        next(train_batches(config, tokenizer=tokenizer, dp_rank=0, dp_size=1, data=data))
    assert str(caught.value) == "cannot read the disk"


class Unreadable:
    """Sources whose disk went away."""

    def read(self, pieces: object) -> None:
        raise UserError("cannot read the disk")


def test_closing_the_stream_ends_its_thread(folder: Path) -> None:
    def loaders() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "data-loader"]

    config = small_config(folder)
    batches: Iterator[PackedBatch] = train_batches(
        config, tokenizer=open_tokenizer(config.data.tokenizer), dp_rank=0, dp_size=1
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
    pages = opened(config).sources[1]
    documents = np.arange(len(pages))
    assert len(pages) == len(page_documents(40, seed=1))
    assert (pages.num_tokens(documents) + 3 * pages.num_images(documents) > config.data.seq_length).any()
