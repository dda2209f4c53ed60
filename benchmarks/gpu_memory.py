"""How much device memory a training step takes in one process, from the configuration alone.

An estimate that decides how deep a slice is; the card has it beside what was measured.
"""

from dataclasses import dataclass, fields

from megatron_mm1.config import MM1Config
from megatron_mm1.config.derived import (
    expert_ffn_size,
    fp8_recipes,
    head_dim,
    is_moe_block,
    num_patches,
    num_query_groups,
    num_vision_blocks,
    padded_vocab_size,
)
from megatron_mm1.config.schema import ModelConfig
from megatron_mm1.planning.parameters import count_parameters

GIB = 2**30
BF16, FP8, FP32 = 2, 1, 4
WORKSPACE = GIB
"""Of cuBLAS, attention kernels and Transformer Engine, and what is lost between the allocator's blocks."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the moment a step needs most.

    Attributes:
        weights: bf16.
        fp8_weights: FP8 copies of the weights of FP8 layers, as they are and transposed.
        gradients: float32.
        optimizer: float32 master weights and two moments.
        activations: kept by blocks of tower and decoder for the backward pass of one microbatch.
        logits: of the output layer in bf16, and their softmax and its gradient in float32.
        workspace: of kernels, and the bf16 gradient of the largest weight before it is added up.
    """

    weights: int
    fp8_weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        return ", ".join(f"{field.name} {getattr(self, field.name) / GIB:.1f}" for field in fields(self))


def estimate(config: MM1Config) -> MemoryEstimate:
    """The estimate for one process that has the whole model, with one sequence a microbatch.

    FP8 layers keep their inputs in FP8; counting them as bf16 leaves room for the copies made while they are.
    """
    model, positions = config.model, config.training.micro_batch_size * config.data.seq_length
    parameters = count_parameters(model).total
    largest = model.decoder.hidden_size * max(
        2 * model.decoder.ffn_hidden_size, padded_vocab_size(model.decoder.vocab_size)
    )
    decoder = sum(_decoder_block(model, block) for block in range(model.decoder.num_layers))
    images = config.training.micro_batch_size * config.data.max_images_per_sequence
    return MemoryEstimate(
        weights=BF16 * parameters,
        fp8_weights=2 * FP8 * _fp8_parameters(config),
        gradients=FP32 * parameters,
        optimizer=3 * FP32 * parameters,
        activations=positions * decoder + images * (_tower(model) + _connector(model)),
        logits=positions * (BF16 + 2 * FP32) * padded_vocab_size(model.decoder.vocab_size),
        workspace=WORKSPACE + BF16 * largest,
    )


def _fp8_parameters(config: MM1Config) -> int:
    """Parameters of the linear layers that multiply in FP8; norms and routers, which are small, are counted in."""
    counts, recipes = count_parameters(config.model), fp8_recipes(config.fp8)
    sizes = {"decoder": counts.decoder, "experts": counts.experts, "tower": counts.vision}
    return sum(size for component, size in sizes.items() if recipes[component] != "bf16")


def _decoder_block(model: ModelConfig, block: int) -> int:
    """Bytes that a decoder block keeps of each position: what its norms and linear layers were given, queries, keys and
    values before and after rotation, what attention gave, gate and up projection, and their product.
    """
    decoder, hidden = model.decoder, model.decoder.hidden_size
    dim = head_dim(decoder)
    query, key_value = decoder.num_attention_heads * dim, num_query_groups(decoder) * dim
    attention = 2 * hidden + 2 * (query + 2 * key_value) + query
    if is_moe_block(model, block):
        assert model.moe is not None
        # Tokens are copied for each of their experts, whose outputs are kept until they are weighed.
        feed_forward = 2 * hidden + model.moe.moe_router_topk * (2 * hidden + 3 * expert_ffn_size(model))
    else:
        feed_forward = 2 * hidden + 3 * decoder.ffn_hidden_size
    return BF16 * (attention + feed_forward)


def _tower(model: ModelConfig) -> int:
    """Bytes that the tower keeps of an image; an activation such as quick GELU keeps its argument, the sigmoid of that
    and the product.
    """
    vision = model.vision
    tokens = num_patches(vision) + vision.class_token
    width = vision.hidden_size
    return BF16 * num_vision_blocks(vision) * tokens * (4 * width + 4 * width + 3 * vision.ffn_hidden_size)


def _connector(model: ModelConfig) -> int:
    """Bytes that a connector keeps of an image: a C-Abstractor's blocks keep ten maps of each place, others less."""
    connector = model.connector
    places = num_patches(model.vision) + connector.tokens_per_image
    blocks = BF16 * 10 * connector.num_layers * places * max(connector.hidden_size, model.vision.hidden_size)
    return blocks + BF16 * 3 * connector.tokens_per_image * model.decoder.hidden_size
