"""Model FLOPs of a training step, from the configuration alone.

A multiply-add is 2 FLOPs and the backward pass costs twice the forward one, so a product [m, k] x [k, n] counts
6 m k n, and 4 m k n beside adapters (`model.lora`), where the weight is frozen. Recomputed activations do not count,
and what `training.freeze` leaves out does. A tower of the user's own counts as a ViT of the configured shape, a
connector as `mlp`.
"""

from megatron_mm1.config.derived import (
    block_pattern,
    expert_ffn_size,
    head_dim,
    is_moe_block,
    lora_targets,
    num_patches,
    num_query_groups,
    num_vision_blocks,
    padded_vocab_size,
)
from megatron_mm1.config.schema import ModelConfig
from megatron_mm1.planning.adapters import layer_adapters, tower_block_adapters

_FORWARD_AND_BACKWARD = 3


def decoder_block_flops(
    model: ModelConfig, *, seq_length: int, block: int, segment_length: float | None = None
) -> float:
    """FLOPs of decoder block `block` on one sequence of S positions, forward and backward.

    Forward, per position: 2 d (q + 2 kv) + 2 q d for the projections, q and kv being heads x head dim; 2 q L for causal
    attention in segments of L positions (half of the 4 q L of full attention); 6 d f for SwiGLU. A block of experts has
    2 d E for the router and 6 d f of an expert for each of the top k.

    Args:
        seq_length: S.
        segment_length: L, the mean length of the packed examples; None: S.
    """
    decoder, layers = model.decoder, block_pattern(model)[2 * block : 2 * block + 2]
    hidden, dim = decoder.hidden_size, head_dim(decoder)
    query, key_value = decoder.num_attention_heads * dim, num_query_groups(decoder) * dim
    length = seq_length if segment_length is None else segment_length
    projections = 2 * hidden * (query + 2 * key_value) + 2 * query * hidden
    if model.moe is not None and is_moe_block(model, block):
        feed_forward = 2 * hidden * model.moe.num_moe_experts
        feed_forward += model.moe.moe_router_topk * 6 * hidden * expert_ffn_size(model)
    else:
        feed_forward = 6 * hidden * decoder.ffn_hidden_size
    weights = _passes(model, "decoder") * (projections + feed_forward)
    adapters = 2 * sum(adapter.parameters() for layer in layers for adapter in layer_adapters(model, layer))
    return seq_length * (weights + _FORWARD_AND_BACKWARD * (2 * query * length + adapters))


def output_flops(model: ModelConfig, *, seq_length: int) -> float:
    """FLOPs of the output layer on one sequence, forward and backward: 6 S d V with the padded vocabulary V."""
    decoder = model.decoder
    passes = _passes(model, "decoder")
    return passes * 2 * seq_length * decoder.hidden_size * padded_vocab_size(decoder.vocab_size)


def tower_flops(model: ModelConfig) -> float:
    """FLOPs of the tower on one image, forward and backward.

    Forward, for N patches of p x p px, T = N (+ 1 with a class token), width C and feed-forward F: 6 N p^2 C for the
    patches; per block 8 T C^2 + 4 T C F for its linear layers and 4 T^2 C for full attention.
    """
    vision, passes = model.vision, _passes(model, "tower")
    patches, width = num_patches(vision), vision.hidden_size
    tokens = patches + vision.class_token
    patch_embedding = 6 * patches * vision.patch_size**2 * width
    linear = 8 * tokens * width**2 + 4 * tokens * width * vision.ffn_hidden_size
    adapters = 2 * tokens * sum(adapter.parameters() for adapter in tower_block_adapters(model))
    block = passes * linear + _FORWARD_AND_BACKWARD * (4 * tokens**2 * width + adapters)
    # Pixels need no gradient, so the patch embedding has a product less.
    return (passes - 1) * patch_embedding + num_vision_blocks(vision) * block


def _passes(model: ModelConfig, component: str) -> int:
    """Products of a weight and its input or gradients: the gradient of a weight beside adapters is left out."""
    return _FORWARD_AND_BACKWARD - bool(lora_targets(model.lora, component))


def vision_flops(model: ModelConfig) -> float:
    """FLOPs of tower and connector on one image, forward and backward."""
    return tower_flops(model) + _FORWARD_AND_BACKWARD * _connector_forward(model)


def decoder_flops(model: ModelConfig, *, seq_length: int, segment_length: float | None = None) -> float:
    """FLOPs of all decoder blocks and the output layer on one sequence, forward and backward."""
    return output_flops(model, seq_length=seq_length) + sum(
        decoder_block_flops(model, seq_length=seq_length, block=block, segment_length=segment_length)
        for block in range(model.decoder.num_layers)
    )


def step_flops(
    model: ModelConfig,
    *,
    seq_length: int,
    num_sequences: int,
    num_images: float,
    segment_length: float | None = None,
) -> float:
    """FLOPs of one training step over `num_sequences` sequences that hold `num_images` images in all."""
    decoder = decoder_flops(model, seq_length=seq_length, segment_length=segment_length)
    return num_sequences * decoder + num_images * vision_flops(model)


def _connector_forward(model: ModelConfig) -> float:
    """Forward FLOPs of the connector on one image; norms, activations and pooling are left out."""
    connector = model.connector
    patches, tokens = num_patches(model.vision), connector.tokens_per_image
    width, inner, hidden = model.vision.hidden_size, connector.hidden_size, model.decoder.hidden_size
    match connector.connector:
        case "average_pool":
            return 2 * tokens * width * hidden
        case "attention_pool":
            keys_values = 2 * patches * width * 2 * inner
            queries_and_output = 2 * tokens * inner * (2 * inner + hidden)
            return keys_values + queries_and_output + 4 * tokens * patches * inner
        case "c_abstractor":
            first = _regnet_block_forward(patches, width, inner)
            second = _regnet_block_forward(patches, inner, inner)
            after_pooling = _regnet_block_forward(tokens, inner, inner)
            projection = 2 * tokens * (inner * hidden + hidden**2)
            return first + (connector.num_layers - 1) * second + connector.num_layers * after_pooling + projection
        case _:
            return 2 * tokens * (width * hidden + hidden**2)


def _regnet_block_forward(positions: int, channels: int, width: int) -> float:
    """1x1 convolution, 3x3 depthwise, squeeze-excite on the mean, 1x1, and a 1x1 shortcut where the widths differ."""
    per_position = 2 * channels * width + 18 * width + 2 * width**2 + 2 * channels * width * (channels != width)
    return positions * per_position + 4 * width * round(0.25 * channels)
