"""Every matrix product with a weight that a rank runs for a microbatch, from the configuration alone.

A linear layer of weight W [N, K] on M positions X is three products: forward Y [M, N] = X W^T, input gradient (dgrad)
dX [M, K] = dY W, and weight gradient (wgrad) dW [N, K] = dY^T X. Attention's products have no weight and stay in bf16.
They are left out, and so are depthwise convolutions and squeeze-excite (one position per image) of the C-Abstractor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from megatron_mm1.config.derived import (
    expert_ffn_size,
    fp8_recipes,
    head_dim,
    is_moe_block,
    num_patches,
    num_query_groups,
    num_vision_blocks,
    padded_vocab_size,
    row_multiple,
)
from megatron_mm1.config.schema import Fp8Recipe, MM1Config

Component = Literal["tower", "connector", "decoder", "experts", "output"]

EXPERT_ROW_MULTIPLE = 16
"""What an expert's tokens are padded to a multiple of, whatever the FP8 recipe: megatron-core's GroupedMLP leaves it to
Transformer Engine's Fp8Padding, whose get_align_size_for_quantization (pytorch/quantization.py) has 32 for MXFP8, 128
for NVFP4 and 16 for the rest."""


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """A linear layer as one rank runs it.

    Attributes:
        component, name: where it is.
        blocks: blocks that have it, over all pipeline stages.
        per_block: how often each runs it: once, or once per local expert.
        m: positions that the rank multiplies, padding left out; of an expert the expected number.
        n, k: the rank's part of the weight [N, K].
        padded_m: m with the rows that are added to make FP8 products legal; of an expert the expected number.
        recipe: what is in force.
        why_bf16: why that is "bf16"; empty in FP8.
        row_shards: sequence-parallel ranks that share the m rows of a column-parallel layer's input, or of a
            row-parallel layer's output gradient, until they are gathered; 1 without sequence parallelism.
        gathered: which of the two it is.
        input_gradient: False where the input is data, so that there is no dgrad.
    """

    component: Component
    name: str
    blocks: int = 1
    per_block: int = 1
    m: float
    n: int
    k: int
    padded_m: float
    recipe: Fp8Recipe
    why_bf16: str = ""
    row_shards: int = 1
    gathered: Literal["input", "output_gradient"] = "input"
    input_gradient: bool = True

    @property
    def count(self) -> int:
        """How often a microbatch runs it, over all pipeline stages."""
        return self.blocks * self.per_block

    @property
    def flops(self) -> float:
        """Of all three products and `count` layers, padding left out."""
        return self.count * 2 * self.m * self.n * self.k * (2 + self.input_gradient)

    @property
    def waste(self) -> float:
        """Share of the multiplied rows that are padding."""
        return 1 - self.m / self.padded_m


def rank_gemms(config: MM1Config, *, images: int | None = None) -> tuple[Gemm, ...]:
    """The linear layers of a rank of each pipeline stage, in the order of the forward pass.

    Tower and connector are listed where they are built-in ones.

    Args:
        config: one that `validate` passes.
        images: in a microbatch; None: as many as it may have.
    """
    if images is None:
        images = config.data.max_images_per_sequence * config.training.micro_batch_size
    return (*_tower(config, images), *_connector(config, images), *_decoder(config), *_experts(config), _output(config))


def vision_tensor_parallel_size(config: MM1Config) -> int:
    """Ranks that split the tower's layers."""
    shared = config.parallel.vision_parallel_mode == "data"
    return 1 if shared else config.parallel.tensor_model_parallel_size


def positions_per_rank(config: MM1Config) -> int:
    """Positions of a microbatch that a rank's decoder layers multiply: sequence parallelism gathers them first."""
    return config.data.seq_length * config.training.micro_batch_size // config.parallel.context_parallel_size


def sequence_shards(config: MM1Config) -> int:
    """Ranks that share a rank's positions between the layers that multiply them."""
    return config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1


def images_per_rank(config: MM1Config, images: int) -> int:
    """Images that the rank with most of them encodes; one without any encodes a blank one (`VisionTower.forward`)."""
    parallel = config.parallel
    ranks = 1
    if parallel.vision_parallel_mode == "data":
        ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return max(1, -(-images // ranks))


def _padded(rows: int, recipe: Fp8Recipe) -> int:
    multiple = row_multiple(recipe)
    return -(-rows // multiple) * multiple


def _tower(config: MM1Config, images: int) -> Iterator[Gemm]:
    vision, size = config.model.vision, vision_tensor_parallel_size(config)
    if vision.tower != "vit":
        return
    images, recipe = images_per_rank(config, images), fp8_recipes(config.fp8)["tower"]
    width, patches = vision.hidden_size, num_patches(vision)
    yield Gemm(
        component="tower",
        name="patch_embedding",
        m=images * patches,
        n=width,
        k=3 * vision.patch_size**2,
        padded_m=images * patches,
        recipe="bf16",
        why_bf16="convolution",
        input_gradient=False,
    )
    rows = images * (patches + vision.class_token)
    layer = partial(
        Gemm,
        component="tower",
        blocks=num_vision_blocks(vision),
        m=rows,
        padded_m=_padded(rows, recipe),
        recipe=recipe,
        why_bf16="recipe" if recipe == "bf16" else "",
    )
    yield layer(name="qkv", n=3 * width // size, k=width)
    yield layer(name="proj", n=width, k=width // size)
    yield layer(name="fc1", n=vision.ffn_hidden_size // size, k=width)
    yield layer(name="fc2", n=width, k=vision.ffn_hidden_size // size)


def _connector(config: MM1Config, images: int) -> Iterator[Gemm]:
    """Replicated over tensor-parallel ranks; its last linear layers can be in FP8."""
    connector, vision, hidden = config.model.connector, config.model.vision, config.model.decoder.hidden_size
    images, recipe = images_per_rank(config, images), fp8_recipes(config.fp8)["connector"]
    width, inner, patches = vision.hidden_size, connector.hidden_size, images * num_patches(vision)
    tokens = images * connector.tokens_per_image
    linear = partial(
        Gemm,
        component="connector",
        m=tokens,
        padded_m=_padded(tokens, recipe),
        recipe=recipe,
        why_bf16="recipe" if recipe == "bf16" else "",
    )

    def in_bf16(name: str, why: str, *, m: int, n: int, k: int, blocks: int = 1) -> Gemm:
        return Gemm(
            component="connector", name=name, blocks=blocks, m=m, n=n, k=k, padded_m=m, recipe="bf16", why_bf16=why
        )

    match connector.connector:
        case "average_pool":
            yield linear(name="projection", n=hidden, k=width)
        case "mlp":
            yield linear(name="linear_1", n=hidden, k=width)
            yield linear(name="linear_2", n=hidden, k=hidden)
        case "attention_pool":
            pooling = partial(in_bf16, why="attention pooling")
            yield pooling("query", m=tokens, n=inner, k=inner)
            yield pooling("key_value", m=patches, n=2 * inner, k=width)
            yield pooling("output", m=tokens, n=inner, k=inner)
            yield linear(name="projection", n=hidden, k=inner)
        case "c_abstractor":
            # Each RegNet block has two 1x1 convolutions, and a third as its shortcut where its width changes.
            convolution, depth = partial(in_bf16, why="convolution", n=inner), connector.num_layers
            changes = width != inner
            if changes:
                yield convolution("stage1.0.conv1", m=patches, k=width)
                yield convolution("stage1.0.shortcut", m=patches, k=width)
            yield convolution("stage1.conv", m=patches, k=inner, blocks=2 * depth - changes)
            yield convolution("stage2.conv", m=tokens, k=inner, blocks=2 * depth)
            yield linear(name="readout.0", n=hidden, k=inner)
            yield linear(name="readout.2", n=hidden, k=hidden)


def _decoder(config: MM1Config) -> Iterator[Gemm]:
    """Column-parallel layers split N and row-parallel ones K; SwiGLU's first layer makes gate and value at once."""
    decoder, size = config.model.decoder, config.parallel.tensor_model_parallel_size
    hidden, ffn, dim = decoder.hidden_size, decoder.ffn_hidden_size // size, head_dim(decoder)
    query, key_value = decoder.num_attention_heads * dim // size, num_query_groups(decoder) * dim // size
    rows, blocks = positions_per_rank(config), range(decoder.num_layers)
    dense = [block for block in blocks if not is_moe_block(config.model, block)]
    layer = partial(Gemm, component="decoder", m=rows, padded_m=rows, row_shards=sequence_shards(config))
    for count, recipe, why in _precisions(config, blocks, fp8_recipes(config.fp8)["decoder"]):
        attention = partial(layer, blocks=count, recipe=recipe, why_bf16=why)
        yield attention(name="qkv", n=query + 2 * key_value, k=hidden)
        yield attention(name="proj", n=hidden, k=query, gathered="output_gradient")
    for count, recipe, why in _precisions(config, dense, fp8_recipes(config.fp8)["decoder"]):
        feed_forward = partial(layer, blocks=count, recipe=recipe, why_bf16=why)
        yield feed_forward(name="fc1", n=2 * ffn, k=hidden)
        yield feed_forward(name="fc2", n=hidden, k=ffn, gathered="output_gradient")


def _experts(config: MM1Config) -> Iterator[Gemm]:
    """Router and local experts, where the router spreads tokens evenly and none is padding or dropped."""
    moe, decoder, parallel = config.model.moe, config.model.decoder, config.parallel
    if moe is None:
        return
    blocks = [block for block in range(decoder.num_layers) if is_moe_block(config.model, block)]
    routed = positions_per_rank(config) // sequence_shards(config)
    yield Gemm(
        component="experts",
        name="router",
        blocks=len(blocks),
        m=routed,
        n=moe.num_moe_experts,
        k=decoder.hidden_size,
        padded_m=routed,
        recipe="bf16",
        why_bf16="router, in float32",
    )
    ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    rows = routed * ranks * moe.moe_router_topk / moe.num_moe_experts
    ffn = expert_ffn_size(config.model) // parallel.expert_tensor_parallel_size
    for count, recipe, why in _precisions(config, blocks, fp8_recipes(config.fp8)["experts"]):
        # Every remainder of an expert's tokens is as likely as the next, so the mean is half a multiple less a half.
        padding = 0 if recipe == "bf16" else (EXPERT_ROW_MULTIPLE - 1) / 2
        expert = partial(
            Gemm,
            component="experts",
            blocks=count,
            per_block=moe.num_moe_experts // parallel.expert_model_parallel_size,
            m=rows,
            padded_m=rows + padding,
            recipe=recipe,
            why_bf16=why,
        )
        yield expert(name="fc1", n=2 * ffn, k=decoder.hidden_size)
        yield expert(name="fc2", n=decoder.hidden_size, k=ffn)


def _output(config: MM1Config) -> Gemm:
    decoder, size = config.model.decoder, config.parallel.tensor_model_parallel_size
    rows = positions_per_rank(config)
    return Gemm(
        component="output",
        name="output_layer",
        m=rows,
        n=padded_vocab_size(decoder.vocab_size, size) // size,
        k=decoder.hidden_size,
        padded_m=rows,
        recipe="bf16",
        why_bf16="output layer",
    )


def _precisions(config: MM1Config, blocks: Sequence[int], recipe: Fp8Recipe) -> Iterator[tuple[int, Fp8Recipe, str]]:
    """How many of `blocks` run in which recipe, and why that is bf16."""
    if recipe == "bf16":
        yield len(blocks), recipe, "recipe"
        return
    first = config.fp8.bf16_blocks_at_start
    end = config.model.decoder.num_layers - config.fp8.bf16_blocks_at_end
    in_fp8 = sum(first <= block < end for block in blocks)
    if in_fp8:
        yield in_fp8, recipe, ""
    if in_fp8 < len(blocks):
        yield len(blocks) - in_fp8, "bf16", "first or last blocks"
