"""The parameters of one rank, from the configuration alone."""

from collections import Counter
from dataclasses import dataclass

from megatron_mm1.config.derived import (
    expert_ffn_size,
    head_dim,
    num_query_groups,
    num_vision_blocks,
    padded_vocab_size,
)
from megatron_mm1.config.schema import MM1Config, VisionConfig
from megatron_mm1.planning.adapters import layer_adapters, tower_block_adapters
from megatron_mm1.planning.gemms import vision_tensor_parallel_size
from megatron_mm1.planning.parameters import connector_parameters, vision_parameters
from megatron_mm1.planning.stages import layer_pattern


@dataclass(frozen=True, kw_only=True)
class RankParameters:
    """Parameters that a rank holds, by component.

    Attributes:
        tower, connector: on the first pipeline rank only.
        decoder: layers and norms without experts; routers are in.
        experts: local ones.
        embedding: the rank's rows of the token embedding and of the output layer.
        tower_adapters, decoder_adapters: of `model.lora`, in none of the others.
    """

    tower: int
    connector: int
    decoder: int
    experts: int
    embedding: int
    tower_adapters: int = 0
    decoder_adapters: int = 0

    @property
    def dense(self) -> int:
        """Those that every data-parallel rank has a copy of; experts have fewer copies."""
        weights = self.tower + self.connector + self.decoder + self.embedding
        return weights + self.tower_adapters + self.decoder_adapters

    @property
    def total(self) -> int:
        return self.dense + self.experts


def stage_layers(config: MM1Config, pipeline_rank: int) -> list[str]:
    """The layers of each of a pipeline rank's stages: `*` attention, `-` feed-forward, `E` experts."""
    return layer_pattern(config).split("|")[pipeline_rank :: config.parallel.pipeline_model_parallel_size]


def rank_parameters(config: MM1Config, pipeline_rank: int) -> RankParameters:
    """What any rank at `pipeline_rank` of the pipeline holds.

    Args:
        config: one that `validate` passes.

    Raises:
        UserError: tower or connector is none of the built-in ones.
    """
    model, parallel = config.model, config.parallel
    decoder, size = model.decoder, parallel.tensor_model_parallel_size
    is_first, is_last = pipeline_rank == 0, pipeline_rank == parallel.pipeline_model_parallel_size - 1
    layers = Counter("".join(stage_layers(config, pipeline_rank)))
    in_decoder = layers["*"] * _attention(config) + layers["-"] * _feed_forward(config)
    in_decoder += decoder.hidden_size * is_last  # the last norm
    experts = 0
    if model.moe is not None:
        in_decoder += layers["E"] * (model.moe.num_moe_experts + 1) * decoder.hidden_size  # router and norm
        each = 3 * decoder.hidden_size * expert_ffn_size(model) // parallel.expert_tensor_parallel_size
        experts = layers["E"] * model.moe.num_moe_experts // parallel.expert_model_parallel_size * each
    rows = padded_vocab_size(decoder.vocab_size, size) // size * decoder.hidden_size
    # Tied weights are one matrix, of which the last stage has a copy where it is not the first.
    tables = is_first + (is_last and (decoder.untie_embeddings_and_output_weights or not is_first))
    connector = connector_parameters(model.connector, vision=model.vision, decoder_hidden_size=decoder.hidden_size)
    return RankParameters(
        tower=_tower(model.vision, vision_tensor_parallel_size(config)) if is_first else 0,
        connector=connector if is_first else 0,
        decoder=in_decoder,
        experts=experts,
        embedding=tables * rows,
        tower_adapters=_tower_adapters(config) if is_first else 0,
        decoder_adapters=sum(
            adapter.parameters(size) for layer in layers.elements() for adapter in layer_adapters(model, layer)
        ),
    )


def _tower_adapters(config: MM1Config) -> int:
    each = sum(
        adapter.parameters(vision_tensor_parallel_size(config)) for adapter in tower_block_adapters(config.model)
    )
    return num_vision_blocks(config.model.vision) * each


def _attention(config: MM1Config) -> int:
    """An attention layer and the norm in front."""
    decoder, size = config.model.decoder, config.parallel.tensor_model_parallel_size
    dim = head_dim(decoder)
    query, key_value = decoder.num_attention_heads * dim, num_query_groups(decoder) * dim
    projections = decoder.hidden_size * (2 * query + 2 * key_value)
    biases = (query + 2 * key_value) * decoder.add_qkv_bias
    return (projections + biases) // size + decoder.hidden_size + 2 * dim * decoder.qk_layernorm


def _feed_forward(config: MM1Config) -> int:
    """A feed-forward layer and the norm in front."""
    decoder = config.model.decoder
    weights = 3 * decoder.hidden_size * decoder.ffn_hidden_size
    return weights // config.parallel.tensor_model_parallel_size + decoder.hidden_size


def _tower(vision: VisionConfig, size: int) -> int:
    """The tower with its blocks' linear layers split over `size` ranks, but for the biases of row-parallel ones."""
    width, ffn = vision.hidden_size, vision.ffn_hidden_size
    split = 4 * width**2 + 3 * width + 2 * width * ffn + ffn
    return vision_parameters(vision) - num_vision_blocks(vision) * (split - split // size)
