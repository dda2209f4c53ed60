"""Sizes that follow from a configuration, computed in one place."""

import math
from collections.abc import Mapping

from megatron_mm1.config.schema import (
    DecoderConfig,
    Fp8Config,
    Fp8Recipe,
    LoraConfig,
    MM1Config,
    ModelConfig,
    ParallelConfig,
    VisionConfig,
)

COMPONENTS = {"tower": "tower.", "connector": "connector.", "decoder": "language_model."}
"""The model's parts, and what the names of their tensors begin with."""


LORA_A, LORA_B = "lora_A", "lora_B"
"""What an adapter's tensors are called, beside `weight` of the layer that has it."""


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int = 1) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple of 128 that tensor parallelism divides.

    The same for every power-of-two tensor-parallel size up to 128: a checkpoint moves between those layouts as it is.
    """
    multiple = math.lcm(128, tensor_model_parallel_size)
    return -(-vocab_size // multiple) * multiple


def head_dim(decoder: DecoderConfig) -> int:
    return decoder.kv_channels or decoder.hidden_size // decoder.num_attention_heads


def num_query_groups(decoder: DecoderConfig) -> int:
    return decoder.num_query_groups or decoder.num_attention_heads


def is_moe_block(model: ModelConfig, block: int) -> bool:
    """Whether decoder block `block` (from 0) has experts in place of its feed-forward layer."""
    return model.moe is not None and (block + 1) % model.moe.moe_layer_freq == 0


def block_pattern(model: ModelConfig) -> str:
    """The decoder's layers in order, two a block: `*` attention, `-` feed-forward, `E` experts."""
    return "".join("*E" if is_moe_block(model, block) else "*-" for block in range(model.decoder.num_layers))


def num_moe_blocks(model: ModelConfig) -> int:
    return sum(is_moe_block(model, block) for block in range(model.decoder.num_layers))


def expert_ffn_size(model: ModelConfig) -> int:
    """Width of one expert; the dense width where there are none or they do not differ."""
    return (model.moe and model.moe.moe_ffn_hidden_size) or model.decoder.ffn_hidden_size


def num_patches(vision: VisionConfig) -> int:
    """Patch tokens of one image, without the class token."""
    return (vision.image_size // vision.patch_size) ** 2


def num_vision_blocks(vision: VisionConfig) -> int:
    """Blocks that are built: those after `feature_layer` are not."""
    return vision.num_layers + vision.feature_layer + 1


def lora_targets(lora: LoraConfig | None, component: str) -> frozenset[str]:
    """The linear layers of one of COMPONENTS that have adapters; empty: it has none."""
    targets = {"decoder": lora.decoder_targets, "tower": lora.tower_targets} if lora is not None else {}
    return frozenset(targets.get(component, ()))


def frozen_weights(config: MM1Config) -> frozenset[str]:
    """The components of which nothing is trained, or nothing but adapters."""
    adapted = {component for component in COMPONENTS if lora_targets(config.model.lora, component)}
    return frozenset(config.training.freeze) | adapted


def lora_scale(lora: LoraConfig) -> float:
    """What an adapter's output is multiplied by."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.use_rslora else lora.rank)


def smallest_world_size(parallel: ParallelConfig) -> int:
    """Processes that a layout takes at least."""
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    stage = math.lcm(parallel.tensor_model_parallel_size * parallel.context_parallel_size, experts)
    return parallel.pipeline_model_parallel_size * stage


def fp8_recipes(fp8: Fp8Config) -> Mapping[str, Fp8Recipe]:
    """The recipe of each component's linear layers: "decoder", "experts", "tower", "connector"."""
    return {
        "decoder": fp8.decoder_recipe,
        "experts": fp8.experts_recipe or fp8.decoder_recipe,
        "tower": fp8.tower_recipe,
        "connector": fp8.connector_recipe,
    }


def uses_fp8(fp8: Fp8Config) -> bool:
    return any(recipe != "bf16" for recipe in fp8_recipes(fp8).values())


def row_multiple(recipe: Fp8Recipe) -> int:
    """What the number of rows (positions) of a product's input is padded to a multiple of where they can be chosen.

    FP8 products on Hopper take 16 at a time; "fp8_blockwise" has a scale per 128 rows and columns.
    """
    return {"bf16": 1, "fp8_delayed": 16, "fp8_tensorwise": 16, "fp8_blockwise": 128}[recipe]
