"""What one microbatch leaves on a rank for its backward pass, in bytes, from the configuration alone.

Counted are the inputs of norms, linear layers and activations, and what attention is given and gives: attention kernels
keep no scores. FP8 layers keep their inputs in FP8; counting them as bf16 leaves room for the copies made meanwhile.
"""

from collections.abc import Sequence
from itertools import batched

from megatron_mm1.config.derived import (
    expert_ffn_size,
    head_dim,
    num_patches,
    num_query_groups,
    num_vision_blocks,
    padded_vocab_size,
)
from megatron_mm1.config.schema import MM1Config
from megatron_mm1.planning.adapters import Adapter, layer_adapters, tower_block_adapters
from megatron_mm1.planning.gemms import (
    images_per_rank,
    positions_per_rank,
    sequence_shards,
    vision_tensor_parallel_size,
)

FP32 = 4


def element_size(config: MM1Config) -> int:
    """Bytes of a weight or an activation."""
    return 2 if config.training.precision == "bf16" else FP32


def stage_activations(config: MM1Config, layers: str) -> int:
    """Bytes that a stage of these decoder layers (`*`, `-`, `E`) keeps, recomputation counted."""
    training, whole = config.training, [_layer(config, layer) for layer in layers]
    if training.recompute_granularity != "full":
        return sum(whole)
    stretch, kept = training.recompute_num_layers, _hidden(config)
    if training.recompute_method == "block":
        return kept * min(stretch, len(whole)) + sum(whole[stretch:])
    return kept * -(-len(whole) // stretch)


def recomputed_at_once(config: MM1Config, layers: str) -> int:
    """Bytes of the stretch of layers that is computed anew at a time; 0 without full recomputation."""
    training = config.training
    if training.recompute_granularity != "full":
        return 0
    length = 1 if training.recompute_method == "block" else training.recompute_num_layers
    return max((sum(_layer(config, layer) for layer in stretch) for stretch in batched(layers, length)), default=0)


def vision_activations(config: MM1Config) -> int:
    """Bytes that tower and connector keep of the images of a microbatch, on the rank that encodes most of them."""
    frozen = config.training.freeze
    if {"tower", "connector"} <= set(frozen):
        return 0
    images = images_per_rank(config, config.training.micro_batch_size * config.data.max_images_per_sequence)
    tower = 0 if "tower" in frozen else _tower(config)
    return images * (tower + _connector(config))


def logits(config: MM1Config) -> int:
    """Bytes of the output layer's logits, and of their softmax and its gradient in float32."""
    size = config.parallel.tensor_model_parallel_size
    vocabulary = padded_vocab_size(config.model.decoder.vocab_size, size) // size
    return positions_per_rank(config) * vocabulary * (element_size(config) + 2 * FP32)


def _hidden(config: MM1Config) -> int:
    """Bytes of the residual stream, which sequence-parallel ranks share."""
    positions = positions_per_rank(config) // sequence_shards(config)
    return positions * config.model.decoder.hidden_size * element_size(config)


def _layer(config: MM1Config, layer: str) -> int:
    """Bytes that a decoder layer keeps: beside what its norm was given and gave, queries, keys and values before and
    after rotation and what attention gave; or gate and up projection and their product.
    """
    training, size = config.training, config.parallel.tensor_model_parallel_size
    is_selective = training.recompute_granularity == "selective"
    name = {"*": "core_attn", "-": "mlp", "E": "moe"}[layer]
    inner = 0
    # Attention's own inputs are kept either way, so that recomputing it frees next to nothing.
    if layer == "*" or not (is_selective and name in training.recompute_modules):
        values = _attention_values(config) if layer == "*" else _feed_forward_values(config, layer)
        inner = positions_per_rank(config) * values * element_size(config) // size
        inner += positions_per_rank(config) * _adapter_values(config, layer_adapters(config.model, layer), size)
    return 2 * _hidden(config) + inner


def _adapter_values(config: MM1Config, adapters: Sequence[Adapter], size: int) -> int:
    """Bytes of a position that adapters keep: A x and, with dropout, its input and which of it was dropped."""
    dropout = config.model.lora is not None and config.model.lora.dropout > 0
    low = 2 * sum(adapter.rank for adapter in adapters)  # as it is and scaled
    inputs = sum(adapter.inputs_on(size) for adapter in adapters) if dropout else 0
    return element_size(config) * low + (element_size(config) + 1) * inputs


def _attention_values(config: MM1Config) -> int:
    decoder = config.model.decoder
    dim = head_dim(decoder)
    query, key_value = decoder.num_attention_heads * dim, num_query_groups(decoder) * dim
    return 2 * (query + 2 * key_value) + query


def _feed_forward_values(config: MM1Config, layer: str) -> int:
    """Per position, over all tensor-parallel ranks."""
    model, parallel = config.model, config.parallel
    if layer == "-" or model.moe is None:
        return 3 * model.decoder.ffn_hidden_size
    # Tokens are copied for each of their experts, whose outputs are kept until they are weighed; ranks that share an
    # expert each have all of its tokens.
    shared = parallel.expert_tensor_parallel_size
    copies = 2 * model.decoder.hidden_size * shared
    return model.moe.moe_router_topk * (copies + 3 * expert_ffn_size(model))


def _tower(config: MM1Config) -> int:
    """Bytes of an image: an activation such as quick GELU keeps its argument, the sigmoid of that and the product."""
    vision, size = config.model.vision, vision_tensor_parallel_size(config)
    tokens, width = num_patches(vision) + vision.class_token, vision.hidden_size
    block = element_size(config) * (4 * width + (4 * width + 3 * vision.ffn_hidden_size) // size)
    block += _adapter_values(config, tower_block_adapters(config.model), size)
    blocks = num_vision_blocks(vision)
    recomputed = blocks * width * element_size(config) + block
    return tokens * (recomputed if config.training.vision_recompute else blocks * block)


def _connector(config: MM1Config) -> int:
    """Bytes of an image: a C-Abstractor's blocks keep ten maps of each place, others less."""
    model, connector = config.model, config.model.connector
    places = num_patches(model.vision) + connector.tokens_per_image
    blocks = 10 * connector.num_layers * places * max(connector.hidden_size, model.vision.hidden_size)
    return element_size(config) * (blocks + 3 * connector.tokens_per_image * model.decoder.hidden_size)
