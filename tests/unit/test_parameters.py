"""Computed parameter counts against modules: transformers' and timm's of the same shape, and this package's own."""

from dataclasses import replace

import pytest
import torch
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megatron_mm1.config.presets import VIT_H_14_378, VIT_L_14_336, preset
from megatron_mm1.config.schema import ConnectorConfig, DecoderConfig, ModelConfig, MoEConfig, VisionConfig
from megatron_mm1.errors import UserError
from megatron_mm1.model.connectors import build_connector
from megatron_mm1.planning.parameters import connector_parameters, count_parameters, vision_parameters

SMALL = VisionConfig(
    image_size=48, patch_size=8, num_layers=4, hidden_size=64, ffn_hidden_size=160, num_attention_heads=4
)


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def decoder_size(config: DecoderConfig, moe: MoEConfig | None = None) -> int:
    counts = count_parameters(ModelConfig(decoder=config, moe=moe))
    return counts.embedding + counts.non_embedding + counts.output


def shape(config: VisionConfig) -> dict[str, int]:
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }


@pytest.mark.parametrize("config", [SMALL, VIT_L_14_336, VIT_H_14_378], ids=["small", "ViT-L/14", "ViT-H/14"])
def test_tower_has_the_parameters_of_clip(config: VisionConfig) -> None:
    with torch.device("meta"):
        reference = CLIPVisionModel(CLIPVisionConfig(**shape(config)))
    assert vision_parameters(config) == size(reference)


def test_tower_has_the_parameters_of_siglip() -> None:
    with torch.device("meta"):
        reference = SiglipVisionModel(SiglipVisionConfig(**shape(SMALL), vision_use_head=False))
    config = replace(SMALL, class_token=False, pre_layernorm=False, patch_bias=True)
    assert vision_parameters(config) == size(reference)


def test_blocks_after_the_feature_layer_and_the_last_norm_are_not_built() -> None:
    three_blocks = replace(SMALL, num_layers=3)
    assert vision_parameters(replace(SMALL, feature_layer=-2)) == vision_parameters(three_blocks)
    assert vision_parameters(replace(SMALL, final_layernorm=False)) == vision_parameters(SMALL) - 2 * 64


DECODER = DecoderConfig(num_layers=4, hidden_size=96, ffn_hidden_size=160, num_attention_heads=6, vocab_size=256)
REFERENCE = {
    "num_hidden_layers": 4,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "vocab_size": 256,
    "head_dim": 16,
}


@pytest.mark.parametrize(
    ("changes", "reference"),
    [
        ({}, (LlamaConfig, LlamaForCausalLM, {})),
        ({"num_query_groups": 2}, (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2})),
        ({"kv_channels": 32}, (LlamaConfig, LlamaForCausalLM, {"head_dim": 32})),
        (
            {"untie_embeddings_and_output_weights": False},
            (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
        ),
        (
            {"add_qkv_bias": True, "num_query_groups": 2},
            (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2}),
        ),
        ({"qk_layernorm": True}, (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 6})),
    ],
    ids=["plain", "gqa", "head dim", "tied", "qkv bias", "qk norm"],
)
def test_decoder_has_the_parameters_of_transformers(changes: dict, reference: tuple) -> None:
    config_class, model_class, options = reference
    with torch.device("meta"):
        model = model_class(config_class(**{"num_key_value_heads": 6, **REFERENCE, **options}))
    assert decoder_size(replace(DECODER, **changes)) == size(model)


def test_experts_have_the_parameters_of_mixtral() -> None:
    moe = MoEConfig(num_moe_experts=8, moe_layer_freq=1)
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**REFERENCE, num_key_value_heads=6, num_local_experts=8))
    assert decoder_size(DECODER, moe) == size(model)


def test_a_token_passes_through_the_top_experts_of_every_nth_block() -> None:
    moe = MoEConfig(num_moe_experts=8, moe_layer_freq=2, moe_ffn_hidden_size=32, moe_router_topk=3)
    counts = count_parameters(ModelConfig(decoder=DECODER, moe=moe))
    expert = 3 * 96 * 32
    assert (counts.experts, counts.active_experts) == (2 * 8 * expert, 2 * 3 * expert)
    assert counts.total - counts.active == 2 * 5 * expert


@pytest.mark.parametrize("width", [64, 96], ids=["shortcut by identity", "shortcut by convolution"])
def test_c_abstractor_has_the_parameters_of_timms_regnet_stages(width: int) -> None:
    options = {"stride": 1, "dilation": 1, "act_layer": torch.nn.SiLU, "norm_layer": LayerNorm2d}
    stages = [RegStage(3, channels, width, **options) for channels in (64, width)]
    positions, readout = 36 * 64, (width + 1) * 80 + 81 * 80
    config = ConnectorConfig(connector="c_abstractor", hidden_size=width, tokens_per_image=9)
    expected = sum(map(size, stages)) + positions + readout
    assert connector_parameters(config, vision=SMALL, decoder_hidden_size=80) == expected


@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize(
    ("kind", "tokens"), [("average_pool", 9), ("attention_pool", 7), ("c_abstractor", 9), ("mlp", 36)]
)
def test_connector_is_counted_as_it_is_built(kind: str, tokens: int, width: int) -> None:
    config = ConnectorConfig(connector=kind, tokens_per_image=tokens, hidden_size=width, num_layers=2)
    built = build_connector(config, vision_hidden_size=64, hidden_size=80, grid=(6, 6))
    assert connector_parameters(config, vision=SMALL, decoder_hidden_size=80) == size(built)


def test_components_add_up() -> None:
    counts = count_parameters(preset("mm1-3b").model)
    assert counts.total == counts.vision + counts.connector + counts.embedding + counts.decoder + counts.output
    assert counts.embedding == 32000 * 3072


@pytest.mark.parametrize(
    ("part", "change"), [("vision", {"tower": "own.Tower"}), ("connector", {"connector": "own.C"})]
)
def test_a_part_of_the_users_own_is_not_guessed(part: str, change: dict) -> None:
    model = preset("mm1-tiny").model
    with pytest.raises(UserError, match="cannot be counted"):
        count_parameters(replace(model, **{part: replace(getattr(model, part), **change)}))
