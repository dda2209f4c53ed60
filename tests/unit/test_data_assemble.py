"""Packed batches against an assembler so plain that it can be seen to be right."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mm1.data.assemble import Assembler, Row
from megatron_mm1.data.batch import IGNORE, PackedBatch
from megatron_mm1.data.image_tokens import ImageTokens
from megatron_mm1.data.images import ImageProcessor
from megatron_mm1.data.images.augmentation import RandomResizedCrop
from megatron_mm1.data.source import Piece
from megatron_mm1.data.tiling import Tiling
from megatron_mm1.errors import UserError
from tests.corpora import encoded

SEQ, PER_IMAGE, IMAGE, PAD = 40, 3, 4, 0
PICTURES = [encoded(seed=seed) for seed in range(4)]


def piece(
    tokens: list[int], trained: list[bool] | None = None, images: tuple[bytes | None, ...] | None = None
) -> Piece:
    if trained is None:
        trained = [token != IMAGE for token in tokens]
    if images is None:
        images = tuple(PICTURES[n % 4] for n in range(tokens.count(IMAGE)))
    return Piece(np.array(tokens, np.int64), np.array(trained, bool), images)


def assembler(*, text_only: bool = False, processor: ImageProcessor | None = None) -> Assembler:
    return Assembler(
        seq_length=SEQ,
        image_tokens=ImageTokens(IMAGE, PER_IMAGE),
        pad_id=PAD,
        image_size=8,
        text_only=text_only,
        processor=processor,
    )


def plain(rows: list[Row], *, text_only: bool) -> dict[str, list]:
    """Position by position, in the order a reader would say it."""
    result: dict[str, list] = {
        name: [] for name in ("tokens", "labels", "position_ids", "segment_ids", "source_ids", "slots")
    }
    for b, row in enumerate(rows):
        positions: list[tuple[int, bool, int, int]] = []  # token, trained, place in example, segment
        sources: list[int] = []
        for segment, (source, part) in enumerate(zip(row.sources, row.pieces, strict=True), 1):
            place = 0
            for token, trained in zip(part.tokens.tolist(), part.trained.tolist(), strict=True):
                if token == IMAGE and not text_only:
                    start = b * SEQ + len(positions)
                    result["slots"].append(list(range(start, start + PER_IMAGE)))
                for _ in range((0 if text_only else PER_IMAGE) if token == IMAGE else 1):
                    positions.append((token, trained, place, segment))
                    place += 1
                    sources.append(source)
        labels = []
        for here, following in zip(positions, [*positions, (PAD, False, 0, 0)][1:], strict=True):
            labels.append(following[0] if row.trained and following[1] and following[3] == here[3] else IGNORE)
        padding = SEQ - len(positions)
        result["tokens"].append([p[0] for p in positions] + [PAD] * padding)
        result["labels"].append(labels + [IGNORE] * padding)
        result["position_ids"].append([p[2] for p in positions] + [0] * padding)
        result["segment_ids"].append([p[3] for p in positions] + [0] * padding)
        result["source_ids"].append(sources + [row.sources[-1] if row.sources else 0] * padding)
    return result


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    made = []
    for _ in range(draw(st.integers(1, 3))):
        pieces, room = [], SEQ
        for _ in range(draw(st.integers(0, 4))):
            tokens = draw(st.lists(st.sampled_from([1, IMAGE, 5, 6, 7, 8]), min_size=1, max_size=12))
            room -= len(tokens) + (PER_IMAGE - 1) * tokens.count(IMAGE)
            if room < 0:
                break
            pieces.append(piece(tokens, [token != IMAGE and draw(st.booleans()) for token in tokens]))
        sources = [draw(st.integers(0, 3)) for _ in pieces]
        made.append(Row(sources, pieces, trained=draw(st.sampled_from([True, True, True, False]))))
    return made


@given(rows(), st.booleans())
def test_batch_equals_the_plain_one(rows: list[Row], text_only: bool) -> None:
    batch = assembler(text_only=text_only)(rows)
    reference = plain(rows, text_only=text_only)
    for name in ("tokens", "labels", "position_ids", "segment_ids", "source_ids"):
        assert getattr(batch, name).tolist() == reference[name], name
    assert [slots for group in batch.images for slots in group.slots.tolist()] == reference["slots"]


def test_dtypes_are_those_of_the_contract() -> None:
    batch = assembler(processor=ImageProcessor(8, (0, 0, 0), (1, 1, 1)))([Row([0], [piece([1, IMAGE, 5])])])
    (group,) = batch.images
    found = {
        name: getattr(batch, name).dtype for name in ("tokens", "labels", "position_ids", "segment_ids", "source_ids")
    }
    assert found == dict.fromkeys(found, torch.int64) | {"segment_ids": torch.int32}
    assert (group.slots.dtype, group.pixels.dtype, group.pixels.shape) == (torch.int64, torch.uint8, (1, 3, 8, 8))
    assert group.tile_index is None
    assert batch.to(torch.device("cpu")).images[0].pixels.dtype == torch.float32


def test_last_image_slot_predicts_the_text_behind_it() -> None:
    batch = assembler()([Row([0], [piece([1, IMAGE, 5, 6])])])
    assert batch.tokens[0, :6].tolist() == [1, IMAGE, IMAGE, IMAGE, 5, 6]
    assert batch.labels[0, :6].tolist() == [IGNORE, IGNORE, IGNORE, 5, 6, IGNORE]


def test_untrained_text_is_seen_but_not_predicted() -> None:
    question = piece([1, 5, 6, 7, 2], [False, False, False, True, True])
    assert assembler()([Row([0], [question])]).labels[0, :5].tolist() == [IGNORE, IGNORE, 7, 2, IGNORE]


def test_pixels_stand_in_the_order_of_their_slots() -> None:
    processor = ImageProcessor(8, (0, 0, 0), (1, 1, 1))
    layout = [Row([0, 0], [piece([1, IMAGE, 5], images=(PICTURES[2],)), piece([1, IMAGE], images=(PICTURES[0],))])]
    layout += [Row([1], [piece([5, IMAGE, 6, IMAGE], images=(PICTURES[3], PICTURES[1]))])]
    (group,) = assembler(processor=processor)(layout).images
    assert group.slots[:, 0].tolist() == [1, 6, SEQ + 1, SEQ + 5]
    assert torch.equal(group.to(torch.device("cpu")).pixels, processor([PICTURES[n] for n in (2, 0, 3, 1)])[0])


def test_example_with_a_damaged_image_keeps_its_place_without_labels() -> None:
    """On every rank alike, whether it encodes or not."""

    def batch(image: bytes | None, processor: ImageProcessor | None) -> PackedBatch:
        pieces = [piece([1, 5, 6]), piece([1, IMAGE, 5, 6], images=(image,)), piece([1, 7, 8])]
        return assembler(processor=processor)([Row([0] * 3, pieces)])

    whole = batch(PICTURES[0], None)
    second = whole.segment_ids == 2
    assert (whole.labels[second] != IGNORE).sum() == 2
    for processor in (None, ImageProcessor(8, (0, 0, 0), (1, 1, 1))):
        damaged = batch(None, processor)
        for name in ("tokens", "position_ids", "segment_ids", "source_ids"):
            assert torch.equal(getattr(damaged, name), getattr(whole, name))
        assert (damaged.labels[second] == IGNORE).all()
        assert torch.equal(damaged.labels[~second], whole.labels[~second])
    assert (damaged.images[0].pixels == 128).all()


def test_undecodable_image_is_grey_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    """Its bytes are those that were prepared, so every rank keeps its labels."""
    row = Row([0], [piece([1, IMAGE, 5], images=(b"junk",))])
    batch = assembler(processor=ImageProcessor(8, (0, 0, 0), (1, 1, 1)))([row])
    assert torch.equal(batch.labels, assembler()([row]).labels)
    assert (batch.images[0].pixels == 128).all()
    assert "4 bytes cannot be decoded" in caplog.text


def tiled(kind: str, processor: bool = True) -> Assembler:
    tiling = Tiling(kind, side=8, max_tiles=6)  # type: ignore[arg-type]
    made = ImageProcessor(8, (0, 0, 0), (1, 1, 1), tiling=tiling) if processor else None
    return replace(assembler(processor=made), image_tokens=ImageTokens(IMAGE, PER_IMAGE, tiling))


@pytest.mark.parametrize(
    ("kind", "grids", "index"),
    [
        ("overview_and_crops", [[2, 2]], [[0, -1, -1], [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]),
        ("dynamic", [[1, 2]], [[0, 0, 0], [0, 0, 1], [0, -1, -1]]),
        ("dynamic", [[1, 1], [2, 1]], [[0, -1, -1], [1, 0, 0], [1, 1, 0], [1, -1, -1]]),
    ],
)
def test_image_takes_the_slots_of_its_tiles(kind: str, grids: list, index: list) -> None:
    row = Row([0], [piece([1, *[IMAGE] * len(grids), 5])], grids=[np.array(grids)])
    with_pixels, without = (tiled(kind, processor=processor)([row]) for processor in (True, False))
    (group,) = with_pixels.images
    assert group.tile_index.tolist() == index
    assert group.slots.flatten().tolist() == list(range(1, 1 + PER_IMAGE * len(index)))
    assert with_pixels.tokens[0, 1 + PER_IMAGE * len(index)] == 5
    assert with_pixels.labels[0, PER_IMAGE * len(index)] == 5
    assert group.pixels.shape == (len(index), 3, 8, 8)
    assert torch.equal(without.images[0].slots, group.slots)
    assert torch.equal(without.images[0].tile_index, group.tile_index)


def test_row_that_was_packed_for_fewer_tiles_is_refused() -> None:
    row = Row([0], [piece([1, IMAGE, IMAGE, IMAGE, 5])], grids=[np.full((3, 2), 2)])
    with pytest.raises(UserError, match=r"packed with at least 47 positions and data.seq_length is 40"):
        tiled("overview_and_crops")([row])


def test_crops_depend_on_seed_sequence_and_number_only() -> None:
    """Not on the row's place in the batch; and validation, whose rows have no index, has none."""
    processor = ImageProcessor(8, (0, 0, 0), (1, 1, 1))
    plain = assembler(processor=processor)

    def pixels(*indices: int | None, seed: int = 0) -> list[torch.Tensor]:
        crops = replace(plain, crop=RandomResizedCrop(0.2, 0.5, seed=seed))
        pieces = [piece([1, IMAGE, 5], images=(PICTURES[0],)), piece([IMAGE, 5], images=(PICTURES[0],))]
        return list(crops([Row([0, 0], pieces, index=index) for index in indices]).images[0].pixels)

    together = pixels(7, 8)
    assert all(map(torch.equal, together[2:], pixels(8)))
    assert len({image.numpy().tobytes() for image in [*together, *pixels(7, seed=1)]}) == 6
    whole = plain([Row([0], [piece([1, IMAGE], images=(PICTURES[0],))])]).images[0].pixels[0]
    assert all(torch.equal(image, whole) for image in pixels(None))


@pytest.mark.parametrize("text_only", [True, False])
def test_batch_without_images_has_no_group(text_only: bool) -> None:
    tokens = [1, IMAGE, 5] if text_only else [1, 5]
    assert assembler(text_only=text_only)([Row([0], [piece(tokens)])]).images == ()
