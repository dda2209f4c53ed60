"""Transformer Engine's layers beside torch's: one set of weights, and both measured against float64."""

from functools import partial

import pytest
import torch

from megatron_mm1.model.mm1 import MM1Model
from megatron_mm1.parallel.device import device
from megatron_mm1.parity.batches import synthetic_batches
from tests.gpu.comparison import Errors, assert_no_worse, errors, outcome
from tests.gpu.marks import TRANSFORMER_ENGINE
from tests.gpu.models import (
    ALL_EXPERTS,
    VIT_H_LIKE,
    random_weights,
    reference_model,
    small_config,
    trained_model,
)

pytestmark = TRANSFORMER_ENGINE

FACTOR = 3
"""How much farther from float64 than torch's bf16 layers Transformer Engine's may be: both round to bf16, in other
places."""

DECODERS = {
    "dense": dict(),
    "grouped queries, normalised": dict(num_query_groups=2, qk_layernorm=True),
    "bias, head dim 128": dict(add_qkv_bias=True, kv_channels=128),
    "experts": dict(moe=ALL_EXPERTS),
}
KINDS = ("mixed", "no image", "most images", "two resolutions", "one-token examples", "padding")


def logits(batch, model: MM1Model) -> torch.Tensor:
    return model(batch, return_logits=True)


def encoded(pixels, model: MM1Model) -> torch.Tensor:
    return model.encode(pixels)


def bf16_errors(config, compute, groups, *, backends) -> list[Errors]:
    """How far each backend in bf16 is from float64."""
    weights = random_weights(config, groups)
    reference = outcome(reference_model(config, weights, groups), compute, groups)
    models = (trained_model(config, weights, groups, backend=backend) for backend in backends)
    return [errors(outcome(model, compute, groups), reference) for model in models]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_decoder_and_its_gradients(groups, decoder, kind):
    config = small_config(**DECODERS[decoder])
    compute = partial(logits, synthetic_batches(config, kind)[0].to(device()))
    local, ours = bf16_errors(config, compute, groups, backends=("local", "transformer_engine"))
    assert_no_worse(ours, local, factor=FACTOR)


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_tower_of_vit_h_and_its_gradients(groups, num_images):
    """Head dim 80 and 730 positions, which FP8's and attention's tiles do not divide."""
    config = small_config(vision=VIT_H_LIKE)
    side = VIT_H_LIKE.image_size
    pixels = torch.randn(num_images, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device())
    local, ours = bf16_errors(config, partial(encoded, pixels), groups, backends=("local", "transformer_engine"))
    assert_no_worse(ours, local, factor=FACTOR)
