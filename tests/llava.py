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
from megatron_mm1.model.mm1 import MM1Model

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

IMAGE_ID, PER_IMAGE, IMAGE_SIZE = 7, 16, 32


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
