"""Image encoders of transformers (CLIP, SigLIP) and open_clip, and ours: which tensors correspond."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from megatron_mm1.checkpoint.rules import Correspondence, Filler, Rule, for_layers, grouped, same
from megatron_mm1.config.derived import num_patches, num_vision_blocks
from megatron_mm1.config.schema import VisionConfig

OURS = "tower."
_BLOCK = f"{OURS}encoder.layers.{{layer}}."


@dataclass(frozen=True, kw_only=True)
class TowerNames:
    """What a family calls its tensors; modules have a weight and a bias.

    Attributes:
        prefix: before all names in a file.
        ends: our names of what is no block, and theirs.
        block: how the names of a block begin.
        modules: our names of a block's parts, and theirs.
        qkv: the projections' names without weight or bias: three, or one in which they follow each other.
        unread: how names begin that are no part of a tower.
        projection: a matrix after the last norm, which it cannot be without.
    """

    prefix: str
    ends: Mapping[str, str]
    block: str
    modules: Mapping[str, str] = field(repr=False)
    qkv: tuple[str, ...]
    unread: tuple[str, ...]
    projection: str | None = None


_TRANSFORMERS_BLOCK = {
    "self_attention.linear_qkv.layer_norm_": "layer_norm1.",
    "self_attention.linear_proj.": "self_attn.out_proj.",
    "mlp.linear_fc1.layer_norm_": "layer_norm2.",
    "mlp.linear_fc1.": "mlp.fc1.",
    "mlp.linear_fc2.": "mlp.fc2.",
}
_TRANSFORMERS_QKV = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")

TOWERS: Mapping[str, TowerNames] = {
    "clip": TowerNames(
        prefix="vision_model.",
        ends={
            "class_token": "embeddings.class_embedding",
            "position_embeddings": "embeddings.position_embedding.weight",
            "patch_embedding.": "embeddings.patch_embedding.",
            "pre_layernorm.": "pre_layrnorm.",  # their spelling
            "final_layernorm.": "post_layernorm.",
        },
        block="encoder.layers.{layer}.",
        modules=_TRANSFORMERS_BLOCK,
        qkv=_TRANSFORMERS_QKV,
        unread=("embeddings.position_ids",),
    ),
    "siglip": TowerNames(
        prefix="vision_model.",
        ends={
            "position_embeddings": "embeddings.position_embedding.weight",
            "patch_embedding.": "embeddings.patch_embedding.",
            "final_layernorm.": "post_layernorm.",
        },
        block="encoder.layers.{layer}.",
        modules=_TRANSFORMERS_BLOCK,
        qkv=_TRANSFORMERS_QKV,
        unread=("embeddings.position_ids", "head."),
    ),
    "open_clip": TowerNames(
        prefix="visual.",
        ends={
            "class_token": "class_embedding",
            "position_embeddings": "positional_embedding",
            "patch_embedding.": "conv1.",
            "pre_layernorm.": "ln_pre.",
            "final_layernorm.": "ln_post.",
        },
        block="transformer.resblocks.{layer}.",
        modules={
            "self_attention.linear_qkv.layer_norm_": "ln_1.",
            "self_attention.linear_proj.": "attn.out_proj.",
            "mlp.linear_fc1.layer_norm_": "ln_2.",
            "mlp.linear_fc1.": "mlp.c_fc.",
            "mlp.linear_fc2.": "mlp.c_proj.",
        },
        qkv=("attn.in_proj_",),
        unread=(),
        projection="proj",
    ),
}
"""By family: transformers' CLIPVisionModel and SiglipVisionModel, open_clip's VisionTransformer."""


def tower_correspondence(family: str, vision: VisionConfig) -> Correspondence:
    """The tensors of a tower; names of theirs without `prefix`.

    Blocks of theirs after `vision.feature_layer` are not read and, exported, are not there. Without a last norm in
    ours, theirs is not read, and is exported as the norm that scales by 1.
    """
    names, built = TOWERS[family], num_vision_blocks(vision)
    rules = (*_ends(names, vision), *for_layers(_block(names, vision), [{"layer": layer} for layer in range(built)]))
    unread = names.unread + tuple(names.block.format(layer=layer) for layer in range(built, vision.num_layers))
    fillers = []
    if not vision.final_layernorm:
        norm, width = names.ends["final_layernorm."], vision.hidden_size
        fillers += [Filler(f"{norm}weight", (width,), torch.ones), Filler(f"{norm}bias", (width,))]
    if names.projection:
        fillers.append(Filler(names.projection, (vision.hidden_size, vision.hidden_size), _identity))
    return Correspondence(rules, tuple(fillers), unread, (OURS,))


def _identity(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.eye(*shape)


def _ends(names: TowerNames, vision: VisionConfig) -> list[Rule]:
    width, patch = vision.hidden_size, vision.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "position_embeddings": (num_patches(vision) + vision.class_token, width),
        "patch_embedding.weight": (width, 3, patch, patch),
    }
    if vision.patch_bias:
        shapes["patch_embedding.bias"] = (width,)
    if vision.class_token:
        shapes["class_token"] = (width,)
    for norm, built in (("pre_layernorm", vision.pre_layernorm), ("final_layernorm", vision.final_layernorm)):
        if built:
            shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    rules = []
    for name, shape in shapes.items():
        module, dot, kind = name.partition(".")
        rules.append(same(f"{OURS}{name}", names.ends[module + dot] + kind, shape))
    return rules


def _block(names: TowerNames, vision: VisionConfig) -> list[Rule]:
    width, ffn, heads = vision.hidden_size, vision.ffn_hidden_size, vision.num_attention_heads
    weights = {
        "self_attention.linear_proj.": (width, width),
        "mlp.linear_fc1.": (ffn, width),
        "mlp.linear_fc2.": (width, ffn),
    }
    rules = []
    for ours, theirs in names.modules.items():
        weight = weights.get(ours, (width,))  # else a norm's
        for kind, shape in (("weight", weight), ("bias", weight[:1])):
            rules.append(same(f"{_BLOCK}{ours}{kind}", f"{names.block}{theirs}{kind}", shape))
    for kind, shape in (("weight", (3 * width, width)), ("bias", (3 * width,))):
        projections = [f"{names.block}{projection}{kind}" for projection in names.qkv]
        ours = f"{_BLOCK}self_attention.linear_qkv.{kind}"
        rules.append(grouped(ours, projections, shape, groups=heads, counts=(width // heads,) * 3))
    return rules
