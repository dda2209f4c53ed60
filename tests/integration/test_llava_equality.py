"""The whole model against one that is not ours: transformers' LLaVA with the same weights gives the same logits."""

import pytest
import torch

from megatron_mm1.data.batch import IGNORE, ImageGroup, PackedBatch
from megatron_mm1.model.mm1 import MM1Model
from tests.llava import IMAGE_ID, PER_IMAGE, llava_model, load_llava, mm1_config

VOCABULARY = 200
"""Not a multiple of 128: our embedding has rows more than theirs."""


@pytest.fixture(scope="module")
def llava():
    return llava_model(vocab_size=VOCABULARY).eval()


@pytest.fixture(scope="module")
def mm1(llava, groups):
    config = mm1_config(vocab_size=VOCABULARY)
    model = MM1Model(config, backend="local", pg_collection=groups).eval()
    load_llava(model, llava.state_dict(), config)
    return model


def sample(num_images: int, *, length: int = 70) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids [length], pixels [num_images, 3, 32, 32]); images stand between texts, the first at the start."""
    generator = torch.Generator().manual_seed(num_images)
    tokens = torch.randint(10, VOCABULARY, (length,), generator=generator)
    for image in range(num_images):
        tokens[image * (PER_IMAGE + 3) : image * (PER_IMAGE + 3) + PER_IMAGE] = IMAGE_ID
    return tokens, torch.randn(num_images, 3, 32, 32, generator=generator)


def llava_logits(llava, tokens: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return llava(input_ids=tokens[None], pixel_values=pixels if len(pixels) else None).logits[0]


def packed(samples: list[tuple[torch.Tensor, torch.Tensor]], *, seq_length: int, rows: int = 1) -> PackedBatch:
    """The samples one after the other in `rows` rows, padded at the end of each."""
    shape = (rows, seq_length)
    tokens, segments = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int32)
    positions = torch.zeros(shape, dtype=torch.int64)
    per_row = -(-len(samples) // rows)
    for number, (ids, _) in enumerate(samples):
        row, place = divmod(number, per_row)
        start = sum(len(other) for other, _ in samples[row * per_row : number])
        tokens[row, start : start + len(ids)] = ids
        segments[row, start : start + len(ids)] = place + 1
        positions[row, start : start + len(ids)] = torch.arange(len(ids))
    pixels = torch.cat([pixels for _, pixels in samples])
    slots = (tokens.flatten() == IMAGE_ID).nonzero().view(-1, PER_IMAGE)
    images = (ImageGroup(slots=slots, height=32, width=32, pixels=pixels),) if len(pixels) else ()
    return PackedBatch(tokens, torch.full_like(tokens, IGNORE), positions, segments, torch.zeros_like(tokens), images)


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_logits_equal_transformers(llava, mm1, num_images):
    tokens, pixels = sample(num_images)
    with torch.no_grad():
        logits = mm1(packed([(tokens, pixels)], seq_length=len(tokens)), return_logits=True)[0, :, :VOCABULARY]
    torch.testing.assert_close(logits, llava_logits(llava, tokens, pixels), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_examples_do_not_see_each_other(llava, mm1, rows):
    """Three samples packed together, padded at the end, give what transformers gives for each alone."""
    samples = [sample(1, length=40), sample(0, length=30), sample(3), sample(1, length=50)]
    batch = packed(samples, seq_length=200, rows=rows)
    with torch.no_grad():
        logits = mm1(batch, return_logits=True)
    per_row = len(samples) // rows
    for number, (tokens, pixels) in enumerate(samples):
        row, place = divmod(number, per_row)
        ours = logits[row][batch.segment_ids[row] == place + 1][:, :VOCABULARY]
        torch.testing.assert_close(ours, llava_logits(llava, tokens, pixels), atol=1e-4, rtol=0)
