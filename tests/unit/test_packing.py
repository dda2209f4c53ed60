"""Splitting and packing."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mm1.data.packing import pack_best_fit, split_documents
from megatron_mm1.errors import UserError


def split(
    num_tokens: int, images: list[int], *, tokens_per_image: int, tiles: list[int] | None = None, **limits: int
) -> list[tuple[int, int]]:
    """The stretches of one document."""
    pieces, lengths, num_tiles = split_documents(
        np.array([num_tokens]),
        np.array([0, len(images)]),
        np.array(images, np.int64),
        np.array(tiles or [1] * len(images), np.int64),
        np.array(tiles or [1] * len(images), np.int64) * tokens_per_image,
        **limits,
    )
    for (document, start, stop), length, total in zip(pieces.tolist(), lengths, num_tiles, strict=True):
        inside = [place for place, position in enumerate(images) if start <= position < stop]
        assert document == 0
        assert total == sum(tiles[place] if tiles else 1 for place in inside)
        assert length == stop - start - len(inside) + total * tokens_per_image
    return [(start, stop) for _, start, stop in pieces.tolist()]


def pack(lengths: np.ndarray, images: np.ndarray, **limits: int) -> list[list[int]]:
    """Items of each sequence."""
    items, bounds = pack_best_fit(lengths, images, **limits)
    return [items[first:stop].tolist() for first, stop in pairwise(bounds)]


@st.composite
def marked_documents(draw: st.DrawFn) -> tuple[int, list[int]]:
    kinds = draw(st.lists(st.booleans(), min_size=1, max_size=80))
    return len(kinds), [place for place, is_image in enumerate(kinds) if is_image]


limits = st.fixed_dictionaries(
    {"tokens_per_image": st.integers(1, 9), "seq_length": st.integers(9, 30), "max_images": st.integers(1, 4)}
)


@given(marked_documents(), limits)
def test_stretches_cover_the_document_and_fit(document: tuple[int, list[int]], limits: dict[str, int]) -> None:
    num_tokens, images = document
    stretches = split(num_tokens, images, **limits)
    assert [start for start, _ in stretches] == [0, *(stop for _, stop in stretches[:-1])]
    assert stretches[-1][1] == num_tokens
    for start, stop in stretches:
        inside = sum(start <= place < stop for place in images)
        assert start < stop
        assert inside <= limits["max_images"]
        assert stop - start + inside * (limits["tokens_per_image"] - 1) <= limits["seq_length"]


@given(marked_documents(), limits)
def test_no_image_is_parted_from_its_text(document: tuple[int, list[int]], limits: dict[str, int]) -> None:
    num_tokens, images = document
    for start, stop in split(num_tokens, images, **limits)[:-1]:
        all_images = set(range(start, stop)) <= set(images)
        assert all_images or stop - 1 not in images


@pytest.mark.parametrize(
    ("num_tokens", "images", "expected"),
    [
        (10, [], [(0, 10)]),
        (11, [], [(0, 10), (10, 11)]),
        (8, [0], [(0, 7), (7, 8)]),  # 4 + 6 positions, then 1
        (6, [5], [(0, 6)]),  # 5 + 4 positions
        (12, [6], [(0, 6), (6, 12)]),  # the image would just fit, but its text would not
        (4, [0, 1, 2], [(0, 2), (2, 4)]),  # two images at most
    ],
)
def test_split_examples(num_tokens: int, images: list[int], expected: list[tuple[int, int]]) -> None:
    assert split(num_tokens, images, tokens_per_image=4, seq_length=10, max_images=2) == expected


def test_image_longer_than_a_sequence_is_an_error() -> None:
    with pytest.raises(UserError, match=r"an image takes 144 tokens .*, a sequence holds 128"):
        split(3, [1], tokens_per_image=144, seq_length=128, max_images=16)


def test_tiles_of_one_image_stay_together() -> None:
    limits = {"tokens_per_image": 2, "seq_length": 10, "max_images": 5}
    assert split(6, [0, 3], tiles=[3, 3], **limits) == [(0, 3), (3, 6)]
    with pytest.raises(UserError, match=r"raise data\.seq_length or data.max_images_per_sequence"):
        split(6, [0], tiles=[6], **limits)


@given(st.lists(marked_documents(), max_size=8), limits)
def test_many_documents_are_split_like_each_alone(
    documents: list[tuple[int, list[int]]], limits: dict[str, int]
) -> None:
    counts = [len(images) for _, images in documents]
    pieces, _, _ = split_documents(
        np.array([num_tokens for num_tokens, _ in documents], np.int64),
        np.cumsum([0, *counts]),
        np.array([place for _, images in documents for place in images], np.int64),
        np.ones(sum(counts), np.int64),
        np.full(sum(counts), limits["tokens_per_image"]),
        **{name: limits[name] for name in ("seq_length", "max_images")},
    )
    alone = [
        [number, start, stop]
        for number, (num_tokens, images) in enumerate(documents)
        for start, stop in split(num_tokens, images, **limits)
    ]
    assert pieces.tolist() == alone


items = st.lists(st.tuples(st.integers(1, 32), st.integers(0, 3)), max_size=200)


@given(items, st.integers(1, 10))
def test_packing_keeps_every_item_once_in_order_within_limits(items: list[tuple[int, int]], lookahead: int) -> None:
    lengths, images = np.array(items, np.int64).reshape(-1, 2).T
    packed = pack(lengths, images, seq_length=32, max_images=4, lookahead=lookahead)
    assert sorted(item for sequence in packed for item in sequence) == list(range(len(items)))
    for sequence in packed:
        assert sequence == sorted(sequence)
        assert lengths[sequence].sum() <= 32
        assert images[sequence].sum() <= 4


def test_lookahead_fills_sequences_as_measured() -> None:
    """Web-like lengths: packing in order leaves a quarter of the positions empty, 64 open sequences about 2 %."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(6.8, 1.0, 4000).astype(np.int64) + 8, 4096)
    none = np.zeros_like(lengths)

    def fill(lookahead: int) -> float:
        packed = pack(lengths, none, seq_length=4096, max_images=16, lookahead=lookahead)
        return lengths.sum() / (len(packed) * 4096)

    assert fill(1) < 0.85 < 0.97 < fill(64)


@pytest.mark.parametrize(("length", "images"), [(33, 0), (0, 0), (1, 5)])
def test_item_that_fits_no_sequence_is_refused(length: int, images: int) -> None:
    with pytest.raises(ValueError, match="fit a sequence"):
        pack(np.array([length]), np.array([images]), seq_length=32, max_images=4, lookahead=1)
