"""A small LLaVA of transformers' with random weights, and the same model as ours."""

from typing import TYPE_CHECKING

import torch

from megatron_mm1.checkpoint.families import import_tensors
from megatron_mm1.checkpoint.local_state import local_state_dict
from megatron_mm1.checkpoint.tensors import StateDict, collect
from megatron_mm1.config import (
    ConnectorConfig,
    DecoderConfig,
    MM1Config,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    VisionConfig,
)
from megatron_mm1.data.batch import IGNORE, ImageGroup, PackedBatch
from megatron_mm1.model.mm1 import MM1Model

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

IMAGE_ID, PER_IMAGE, IMAGE_SIZE = 7, 16, 32
VOCABULARY = 200
"""Not a multiple of 128: our embedding has rows more than theirs."""


def llava_model(*, vocab_size: int) -> "LlavaForConditionalGeneration":
    """Every tensor random and distinct, norms and biases too, so that a swapped pair shows."""
    # Worker processes import this module for the rest of it.
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
        ),
        image_token_id=IMAGE_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.15, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model


def mm1_config(*, vocab_size: int) -> MM1Config:
    """The same model, fp32, in one process."""
    return MM1Config(
        name="llava",
        model=ModelConfig(
            vision=VisionConfig(
                image_size=IMAGE_SIZE,
                patch_size=8,
                num_layers=3,
                hidden_size=32,
                ffn_hidden_size=64,
                num_attention_heads=4,
                feature_layer=-2,
                final_layernorm=False,
            ),
            connector=ConnectorConfig(connector="mlp", tokens_per_image=PER_IMAGE),
            decoder=DecoderConfig(
                num_layers=2,
                hidden_size=48,
                ffn_hidden_size=96,
                num_attention_heads=6,
                num_query_groups=2,
                vocab_size=vocab_size,
            ),
        ),
        optimizer=OptimizerConfig(lr=1e-3),
        training=TrainingConfig(precision="fp32"),
    )


def load_llava(model: MM1Model, state: dict[str, torch.Tensor], config: MM1Config) -> None:
    """Put LLaVA's tensors, by LLaVA's names, in the place of the weights of a model that is whole in this process."""
    tensors = collect(import_tensors("llava", config.model, StateDict(state)))
    missing, unexpected = model.load_state_dict(local_state_dict(tensors), strict=False)
    assert not unexpected
    assert not [name for name in missing if not name.endswith("_extra_state")]


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
