"""Exact parameter counts, from the configuration alone."""

from dataclasses import dataclass

from megatron_mm1.config.derived import (
    block_pattern,
    expert_ffn_size,
    head_dim,
    num_moe_blocks,
    num_patches,
    num_query_groups,
    num_vision_blocks,
    padded_vocab_size,
)
from megatron_mm1.config.schema import ConnectorConfig, ModelConfig, VisionConfig
from megatron_mm1.errors import UserError
from megatron_mm1.planning.adapters import layer_adapters, tower_block_adapters


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters by component.

    Attributes:
        vision, connector: the tower and the connector.
        embedding: the token embedding, its vocabulary padded.
        decoder: blocks and final norm without experts; routers are in.
        experts: all experts of all blocks.
        active_experts: of those, what one token passes through.
        output: the output layer; 0 where it is tied to the embedding.
        adapters: of `model.lora`, all of decoder and tower.
    """

    vision: int
    connector: int
    embedding: int
    decoder: int
    experts: int
    active_experts: int
    output: int
    adapters: int = 0

    @property
    def non_embedding(self) -> int:
        """The decoder without embedding and output layer: N of the paper's laws, here with SwiGLU and norms."""
        return self.decoder + self.experts

    @property
    def total(self) -> int:
        parts = self.vision + self.connector + self.embedding + self.non_embedding + self.output
        return parts + self.adapters

    @property
    def active(self) -> int:
        """What one token passes through."""
        return self.total - self.experts + self.active_experts


def count_parameters(model: ModelConfig, *, tensor_model_parallel_size: int = 1) -> ParameterCounts:
    """Counts the parameters of the whole model; tensor parallelism matters only to the vocabulary's padding.

    Raises:
        UserError: tower or connector is none of the built-in ones.
    """
    decoder = model.decoder
    vocabulary = padded_vocab_size(decoder.vocab_size, tensor_model_parallel_size) * decoder.hidden_size
    moe_blocks = num_moe_blocks(model)
    dense_blocks = decoder.num_layers - moe_blocks
    blocks = decoder.num_layers * _attention_and_norms(model) + decoder.hidden_size
    blocks += dense_blocks * 3 * decoder.hidden_size * decoder.ffn_hidden_size
    experts = active = 0
    if model.moe is not None:
        blocks += moe_blocks * model.moe.num_moe_experts * decoder.hidden_size
        expert = 3 * decoder.hidden_size * expert_ffn_size(model)
        experts = moe_blocks * model.moe.num_moe_experts * expert
        active = moe_blocks * model.moe.moe_router_topk * expert
    return ParameterCounts(
        vision=vision_parameters(model.vision),
        connector=connector_parameters(model.connector, vision=model.vision, decoder_hidden_size=decoder.hidden_size),
        embedding=vocabulary,
        decoder=blocks,
        experts=experts,
        active_experts=active,
        output=vocabulary if decoder.untie_embeddings_and_output_weights else 0,
        adapters=_adapters(model),
    )


def _adapters(model: ModelConfig) -> int:
    in_decoder = [adapter for layer in block_pattern(model) for adapter in layer_adapters(model, layer)]
    in_tower = num_vision_blocks(model.vision) * tower_block_adapters(model)
    return sum(adapter.parameters() for adapter in in_decoder + in_tower)


def vision_parameters(vision: VisionConfig) -> int:
    """Parameters of the built-in ViT: linear layers have biases; blocks after `feature_layer` are not built.

    Raises:
        UserError: the tower is none of the built-in ones.
    """
    if vision.tower != "vit":
        raise UserError(f"the parameters of vision.tower {vision.tower!r} cannot be counted ahead: only 'vit' is known")
    width, ffn = vision.hidden_size, vision.ffn_hidden_size
    patches = 3 * vision.patch_size**2 * width + width * vision.patch_bias
    positions = (num_patches(vision) + vision.class_token) * width + width * vision.class_token
    norms = 2 * width * (vision.pre_layernorm + vision.final_layernorm)
    attention = 4 * (width + 1) * width
    feed_forward = (width + 1) * ffn + (ffn + 1) * width
    return patches + positions + norms + num_vision_blocks(vision) * (attention + feed_forward + 4 * width)


def connector_parameters(connector: ConnectorConfig, *, vision: VisionConfig, decoder_hidden_size: int) -> int:
    """Parameters of a built-in connector from a tower's features to the decoder's width.

    Raises:
        UserError: the connector is none of the built-in ones.
    """
    width, inner, hidden = vision.hidden_size, connector.hidden_size, decoder_hidden_size
    match connector.connector:
        case "average_pool":
            return (width + 1) * hidden
        case "mlp":
            return (width + 1) * hidden + (hidden + 1) * hidden
        case "attention_pool":
            queries = connector.tokens_per_image * inner
            projections = 2 * (inner + 1) * inner + 2 * (width + 1) * inner
            norms = 2 * (inner + width)
            return queries + projections + norms + (inner + 1) * hidden
        case "c_abstractor":
            blocks = _regnet_block(width, inner) + (2 * connector.num_layers - 1) * _regnet_block(inner, inner)
            return num_patches(vision) * width + blocks + (inner + 1) * hidden + (hidden + 1) * hidden
        case name:
            raise UserError(f"the parameters of connector {name!r} cannot be counted ahead: it is no built-in one")


def _regnet_block(channels: int, width: int) -> int:
    """1x1, 3x3 depthwise and 1x1 convolution with norms, squeeze-excite, and a shortcut where the widths differ."""
    squeezed = round(0.25 * channels)
    squeeze_excite = (width + 1) * squeezed + (squeezed + 1) * width
    shortcut = (channels + 2) * width if channels != width else 0
    return (channels + 2) * width + (9 + 2) * width + squeeze_excite + (width + 2) * width + shortcut


def _attention_and_norms(model: ModelConfig) -> int:
    """A decoder block without its feed-forward layer: attention, two RMSNorms, optional biases and q/k norms."""
    decoder = model.decoder
    dim = head_dim(decoder)
    query, key_value = decoder.num_attention_heads * dim, num_query_groups(decoder) * dim
    weights = decoder.hidden_size * (query + 2 * key_value) + query * decoder.hidden_size
    biases = (query + 2 * key_value) * decoder.add_qkv_bias
    return weights + biases + 2 * decoder.hidden_size + 2 * dim * decoder.qk_layernorm
