"""Images of high resolution among the tokens of an example: how many, which, and where the slots are."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mm1.config.presets import preset
from megatron_mm1.data.assemble import Assembler, Row
from megatron_mm1.data.image_tokens import ImageTokens
from megatron_mm1.data.plan import packing_limits
from megatron_mm1.data.source import Piece
from megatron_mm1.data.tiling import Tiling
from megatron_mm1.data.tokenizer import Tokenizer
from tests.corpora import small_tokenizer

SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
TILINGS = [Tiling(), Tiling("overview_and_crops", side=672), Tiling("dynamic", side=336, min_tiles=2, max_tiles=9)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_1344_px_are_five_times_144_tokens(tokenizer: Tokenizer) -> None:
    """As MM1 decomposes them: in the plan, and the slots of a batch, whatever the shape of the image."""
    config = preset("mm1-3b")
    config = replace(
        config,
        model=replace(config.model, vision=replace(config.model.vision, image_size=672)),
        data=replace(config.data, image_tiling="overview_and_crops", seq_length=2048),
    )
    tiles, positions = packing_limits(config, tokenizer).of_images(np.array([[1344, 1344], [50, 900]]), np.array([2]))
    assert tiles.tolist() == [5, 5] and positions.tolist() == [720, 720]
    layout = ImageTokens.of(config, tokenizer)
    piece = Piece(np.array([1, layout.image_id, 5]), np.array([False, False, True]), (b"",), ((1344, 1344),))
    grids = layout.tiling.grids(np.array(piece.sizes), 1)
    batch = Assembler.of(config, tokenizer)([Row([0], [piece], grids=[grids])])
    (group,) = batch.images
    assert group.slots.tolist() == np.arange(1, 721).reshape(5, 144).tolist()
    assert (group.height, group.width) == (672, 672)
    assert int((batch.segment_ids > 0).sum()) == 1 + 5 * 144 + 1


@given(st.lists(st.lists(SIZES, max_size=4), max_size=6), st.sampled_from(TILINGS), st.booleans())
def test_plan_counts_the_positions_that_images_take(
    tokenizer: Tokenizer, documents: list[list[tuple[int, int]]], tiling: Tiling, indicators: bool
) -> None:
    layout = ImageTokens(tokenizer.image_id, 3, tiling, tokenizer if indicators else None)
    sizes = np.array([size for document in documents for size in document], np.int64).reshape(-1, 2)
    tiles, positions = layout.costs(sizes, np.array([len(document) for document in documents], np.int64))
    taken = [
        layout.ids(number, tuple(grid))
        for document in documents
        for number, grid in enumerate(tiling.grids(np.array(document).reshape(-1, 2), len(document)).tolist())
    ]
    assert positions.tolist() == [len(ids) for ids in taken]
    assert (3 * tiles).tolist() == [int((ids == layout.image_id).sum()) for ids in taken]


@pytest.mark.parametrize(
    ("tiling", "grid", "expected"),
    [
        (TILINGS[2], (2, 2), ["(1,1,1)", "(1,1,2)", "(1,2,1)", "(1,2,2)", "(1,0,0)"]),
        (TILINGS[1], (2, 2), ["(1,0,0)", "(1,1,1)", "(1,1,2)", "(1,2,1)", "(1,2,2)"]),
        (TILINGS[2], (1, 1), []),
    ],
)
def test_each_tile_stands_behind_its_place(
    tokenizer: Tokenizer, tiling: Tiling, grid: tuple[int, int], expected: list[str]
) -> None:
    ids = ImageTokens(tokenizer.image_id, 3, tiling, tokenizer).ids(1, grid).tolist()
    shown = "".join("I" if token == tokenizer.image_id else tokenizer.decode([token]) for token in ids)
    assert re.sub(r"\s", "", shown) == ("".join(f"{text}III" for text in expected) or "III")


def test_indicators_are_seen_and_not_predicted(tokenizer: Tokenizer) -> None:
    layout = ImageTokens(tokenizer.image_id, 3, TILINGS[2], tokenizer)
    assembler = Assembler(seq_length=96, image_tokens=layout, pad_id=0, image_size=336)
    piece = Piece(np.array([1, layout.image_id, 5, 6]), np.array([False, False, True, True]), (b"",))
    batch = assembler([Row([0], [piece], grids=[np.array([[1, 2]])], first_images=[1])])
    expected = [1, *layout.ids(1, (1, 2)).tolist(), 5, 6]
    assert batch.tokens[0, : len(expected)].tolist() == expected
    labels = batch.labels[0].tolist()
    assert labels[len(expected) - 3 : len(expected) - 1] == [5, 6]
    assert all(label == -100 for place, label in enumerate(labels) if not 0 <= place - len(expected) + 3 < 2)
    (group,) = batch.images
    assert (batch.tokens.flatten()[group.slots] == layout.image_id).all()
    assert (np.diff(group.slots.numpy(), axis=1) == 1).all()  # no text within a tile
    assert group.tile_index.tolist() == [[1, 0, 0], [1, 0, 1], [1, -1, -1]]
