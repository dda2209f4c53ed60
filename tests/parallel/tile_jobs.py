"""Training on images of 1344 px, from their files to the gradients: the corpus, and what each rank runs.

The quarters of every picture have colours of their own, so that a tile's pixels say where in its image it lies.
"""

import dataclasses
import io
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm1.config import MM1Config
from megatron_mm1.config.schema import SourceConfig
from megatron_mm1.data.batch import PackedBatch
from megatron_mm1.data.loader import train_batches
from megatron_mm1.data.prepare import prepare
from megatron_mm1.data.records import Document, Image, Text
from megatron_mm1.data.tokenizer import open_tokenizer
from megatron_mm1.parity import jobs
from tests.corpora import sentence, small_tokenizer

SIDE, TOKENS = 672, 144
"""Of a tile: px, and positions."""
TILINGS = {
    "overview and crops": dict(image_tiling="overview_and_crops"),
    "dynamic, with indicators": dict(image_tiling="dynamic", max_image_tiles=4, tile_indicators=True),
}
"""Kinds of batch, and the settings under `data` that they are made with."""
QUARTERS = np.array([[(200, 40, 40), (40, 200, 40)], [(40, 40, 200), (200, 200, 40)]])
SIZES = [(1344, 1344), (1344, 1344), (672, 1344), (1344, 672), (400, 500)]
"""(height, width) of pictures, px: dynamic grids of 2 x 2, 1 x 2, 2 x 1 and 1 x 1 tiles."""
SHARE_OF_WHOLE = {(2, 2): 1.0, (1, 2): 0.5, (2, 1): 0.5, (1, 1): 0.8}
"""How much of the whole image's square its picture takes, by its dynamic grid; the rest is padding."""


def picture(height: int, width: int, *, seed: int) -> Image:
    """Four colours and a pattern over them whose mean is zero."""
    rows, columns = np.arange(height) * 2 // height, np.arange(width) * 2 // width
    phase = np.random.default_rng(seed).uniform(0, 6)
    waves = 30 * np.sin(np.arange(height)[:, None] / 21 + phase) * np.cos(np.arange(width)[None] / 21)
    pixels = QUARTERS[rows[:, None], columns[None]] + waves[..., None]
    content = io.BytesIO()
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(content, "JPEG", quality=95, subsampling=0)
    return Image(content.getvalue())


def prepare_pictures(folder: Path) -> dict[str, object]:
    """Captioned pictures and text between them; the settings under `data` to train on them."""
    rng = np.random.default_rng(0)
    documents = []
    for number in range(30):
        height, width = SIZES[number % len(SIZES)]
        parts = (picture(height, width, seed=number), Text(sentence(rng, int(rng.integers(2, 9)))))
        documents.append(Document(parts if number % 6 else parts[1:], f"document {number}"))
    prepare(documents, tokenizer=small_tokenizer(folder), output=folder / "pictures")
    source = SourceConfig(name="pictures", path=str(folder / "pictures"), weight=1.0)
    return dict(tokenizer=str(folder / "tokenizer.model"), sources=(source,))


def share_of_tiles(config: MM1Config, kind: str, pg_collection: ProcessGroupCollection) -> list[PackedBatch]:
    """What the loader gives this rank of the first global batch, looked at."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **TILINGS[kind]))
    dp, encodes = pg_collection.dp, pg_collection.pp.rank() == 0
    tokenizer = open_tokenizer(config.data.tokenizer)
    batches = train_batches(config, tokenizer=tokenizer, dp_rank=dp.rank(), dp_size=dp.size(), with_pixels=encodes)
    count = config.training.global_batch_size // (config.training.micro_batch_size * dp.size())
    share = list(islice(batches, count))
    batches.close()
    mine = [grid for batch in share for grid in check_tiles(config, batch, tokenizer.image_id, encodes=encodes)]
    shares: list[list[tuple[int, int]]] = [[] for _ in range(dp.size())]
    torch.distributed.all_gather_object(shares, mine, group=dp)
    grids = {grid for share_of_grids in shares for grid in share_of_grids}
    assert (2, 2) in grids and (len(grids) == 1) == (kind == "overview and crops")
    return share


run_layout = partial(jobs.run_layout, batches=share_of_tiles)
run_reference = partial(jobs.run_reference, batches=share_of_tiles)


def check_tiles(config: MM1Config, batch: PackedBatch, image_id: int, *, encodes: bool) -> list[tuple[int, int]]:
    """The grid of each image: its tiles are all there, in order, of 144 slots each, with the pixels of their places."""
    if not batch.images:
        assert not (batch.tokens == image_id).any()
        return []
    (group,) = batch.images
    slots, index = group.slots, group.tile_index
    assert (group.height, group.width, slots.shape[1]) == (SIDE, SIDE, TOKENS)
    assert slots.flatten().tolist() == (batch.tokens.flatten() == image_id).nonzero().flatten().tolist()
    assert (slots.diff(dim=1) == 1).all()
    assert (group.pixels is not None) == encodes
    assert index is not None
    is_whole = index[:, 1] < 0
    overview_first = config.data.image_tiling == "overview_and_crops"
    grids, tile = [], 0
    while tile < len(index):
        # A whole image begins or ends the tiles of an image; alone it is all of them.
        end = tile + 1
        while end < len(index) and (not is_whole[end] if overview_first else not is_whole[end - 1]):
            end += 1
        grids.append(_check_image(group.slots[tile:end], index[tile:end], overview_first=overview_first))
        if not config.data.tile_indicators:
            assert int(slots[end - 1, -1] - slots[tile, 0]) + 1 == (end - tile) * TOKENS  # side by side
        tile = end
    if encodes:
        _check_pixels(config, group.to(torch.device("cpu")).pixels, index, grids)
    return grids


def _check_image(slots: torch.Tensor, index: torch.Tensor, *, overview_first: bool) -> tuple[int, int]:
    places = index[:, 1:].tolist()
    assert len(index[:, 0].unique()) == 1
    if len(places) == 1:
        assert places == [[-1, -1]]
        return 1, 1
    cells = places[1:] if overview_first else places[:-1]
    rows, columns = (max(numbers) + 1 for numbers in zip(*cells, strict=True))
    assert cells == [[row, column] for row in range(rows) for column in range(columns)]
    assert places.count([-1, -1]) == 1
    return rows, columns


def _check_pixels(config: MM1Config, pixels: torch.Tensor, index: torch.Tensor, grids: list[tuple[int, int]]) -> None:
    """Each tile has the mean colour of the quarters that it shows, within 4 of 256 levels."""
    assert pixels.shape == (len(index), 3, SIDE, SIDE)
    vision = config.model.vision
    mean, std = torch.tensor(vision.image_mean), torch.tensor(vision.image_std)
    shown = (pixels.mean(dim=(2, 3)) * std + mean) * 255
    padding = 255 * mean.numpy()
    of_tiles = [grid for grid in grids for _ in range(grid[0] * grid[1] + (grid != (1, 1)))]
    for colour, (_, row, column), (rows, columns) in zip(shown, index.tolist(), of_tiles, strict=True):
        down = slice(None) if row < 0 or rows == 1 else row
        across = slice(None) if column < 0 or columns == 1 else column
        share = SHARE_OF_WHOLE[rows, columns] if row < 0 else 1.0
        expected = share * QUARTERS[down, across].reshape(-1, 3).mean(axis=0) + (1 - share) * padding
        assert np.abs(colour.numpy() - expected).max() < 4, (row, column, colour, expected)
