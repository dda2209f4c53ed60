"""Pretrained image encoders under our names: what each tensor is called in transformers' and open_clip's models."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_mm1.config.derived import num_vision_blocks
from megatron_mm1.config.schema import VisionConfig
from megatron_mm1.errors import UserError
from megatron_mm1.model.vision import FUSED_NORM_NAMES


@dataclass(frozen=True)
class Rule:
    """Where one of our tensors comes from. `{layer}` stands for a block's number.

    With `qkv`, theirs are the query, key and value projections, three tensors or one in which they follow each other.
    """

    ours: str
    theirs: tuple[str, ...]
    qkv: bool = False

    def at(self, layer: int) -> "Rule":
        """This rule for one block."""
        return Rule(self.ours.format(layer=layer), tuple(name.format(layer=layer) for name in self.theirs), self.qkv)


@dataclass(frozen=True)
class TowerMapping:
    """The tensors of one family of models; `ignored`: prefixes of what is no part of a tower (pooling, projection)."""

    embeddings: tuple[Rule, ...]
    blocks: tuple[Rule, ...]
    ignored: tuple[str, ...]


def _rule(ours: str, theirs: str) -> Rule:
    return Rule(ours, (theirs,))


def _with_bias(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return _rule(f"{ours}.weight", f"{theirs}.weight"), _rule(f"{ours}.bias", f"{theirs}.bias")


def _blocks(
    theirs: str, *, qkv_weight: Sequence[str], qkv_bias: Sequence[str], names: Mapping[str, str]
) -> tuple[Rule, ...]:
    """The rules of a block called `theirs`; `names`: our modules with weight and bias, and what theirs are called."""
    ours = "encoder.layers.{layer}"
    modules = [rule for our, their in names.items() for rule in _with_bias(f"{ours}.{our}", f"{theirs}.{their}")]
    qkv = [
        Rule(f"{ours}.self_attention.linear_qkv.{part}", tuple(f"{theirs}.{name}" for name in sources), qkv=True)
        for part, sources in (("weight", qkv_weight), ("bias", qkv_bias))
    ]
    return (*modules, *qkv)


_TRANSFORMERS_BLOCKS = _blocks(
    "encoder.layers.{layer}",
    qkv_weight=("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    qkv_bias=("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    names={
        "input_layernorm": "layer_norm1",
        "self_attention.linear_proj": "self_attn.out_proj",
        "pre_mlp_layernorm": "layer_norm2",
        "mlp.linear_fc1": "mlp.fc1",
        "mlp.linear_fc2": "mlp.fc2",
    },
)

VISION_MAPPINGS: Mapping[str, TowerMapping] = {
    "clip": TowerMapping(
        embeddings=(
            _rule("class_token", "embeddings.class_embedding"),
            _rule("position_embeddings", "embeddings.position_embedding.weight"),
            _rule("patch_embedding.weight", "embeddings.patch_embedding.weight"),
            *_with_bias("pre_layernorm", "pre_layrnorm"),  # their spelling
            *_with_bias("final_layernorm", "post_layernorm"),
        ),
        blocks=_TRANSFORMERS_BLOCKS,
        ignored=("embeddings.position_ids",),
    ),
    "siglip": TowerMapping(
        embeddings=(
            _rule("position_embeddings", "embeddings.position_embedding.weight"),
            *_with_bias("patch_embedding", "embeddings.patch_embedding"),
            *_with_bias("final_layernorm", "post_layernorm"),
        ),
        blocks=_TRANSFORMERS_BLOCKS,
        ignored=("embeddings.position_ids", "head."),
    ),
    "open_clip": TowerMapping(
        embeddings=(
            _rule("class_token", "class_embedding"),
            _rule("position_embeddings", "positional_embedding"),
            _rule("patch_embedding.weight", "conv1.weight"),
            *_with_bias("pre_layernorm", "ln_pre"),
            *_with_bias("final_layernorm", "ln_post"),
        ),
        blocks=_blocks(
            "transformer.resblocks.{layer}",
            qkv_weight=("attn.in_proj_weight",),
            qkv_bias=("attn.in_proj_bias",),
            names={
                "input_layernorm": "ln_1",
                "self_attention.linear_proj": "attn.out_proj",
                "pre_mlp_layernorm": "ln_2",
                "mlp.linear_fc1": "mlp.c_fc",
                "mlp.linear_fc2": "mlp.c_proj",
            },
        ),
        ignored=("proj",),
    ),
}
"""By family: transformers' CLIPVisionModel and SiglipVisionModel, open_clip's VisionTransformer."""


def interleave_qkv(stacked: Tensor, *, num_attention_heads: int) -> Tensor:
    """[3 * hidden_size, ...], all queries, keys, then values -> megatron-core's order: query, key, value by head."""
    return stacked.unflatten(0, (3, num_attention_heads, -1)).transpose(0, 1).flatten(0, 2)


def import_tower_state(
    source: Mapping[str, Tensor],
    *,
    family: Literal["clip", "siglip", "open_clip"],
    config: VisionConfig,
    prefix: str = "",
    layer_backend: str = "local",
) -> dict[str, Tensor]:
    """The state dict of a `VisionTower` with tensor-parallel size 1, from a pretrained model's.

    Blocks after `config.feature_layer` and, without `config.final_layernorm`, the last norm are left out. Dtypes stay.

    Args:
        source: their tensors by their names.
        prefix: what precedes the tower's names in `source` ("vision_model.", "visual.", ..); other tensors are
            not looked at.
        layer_backend: "local" or "transformer_engine", which name a block's norms differently.

    Raises:
        UserError: a tensor is missing, or there are some that this family and configuration have no place for.
    """
    theirs = {name.removeprefix(prefix): tensor for name, tensor in source.items() if name.startswith(prefix)}
    unbuilt = tuple(f"encoder.layers.{layer}." for layer in range(num_vision_blocks(config), config.num_layers))
    if not config.final_layernorm:
        unbuilt += ("final_layernorm.",)

    state: dict[str, Tensor] = {}
    missing: list[str] = []
    for rule in _rules(VISION_MAPPINGS[family], config):
        parts = [theirs.pop(name) for name in rule.theirs if name in theirs]
        if rule.ours.startswith(unbuilt):
            continue
        if len(parts) < len(rule.theirs):
            missing.extend(prefix + name for name in rule.theirs if prefix + name not in source)
        elif rule.qkv:
            state[rule.ours] = interleave_qkv(torch.cat(parts), num_attention_heads=config.num_attention_heads)
        else:
            (state[rule.ours],) = parts
    surplus = [prefix + name for name in theirs if not name.startswith(VISION_MAPPINGS[family].ignored)]
    if missing or surplus:
        raise UserError(_mismatch(family, config=config, missing=missing, surplus=surplus))

    if layer_backend == "transformer_engine":
        for local, fused in FUSED_NORM_NAMES.items():
            state = {name.replace(f".{local}", f".{fused}"): tensor for name, tensor in state.items()}
    return state


def _rules(mapping: TowerMapping, config: VisionConfig) -> Iterator[Rule]:
    """The rules of each tensor a full tower of this configuration has."""
    left_out = {
        "class_token": config.class_token,
        "pre_layernorm.": config.pre_layernorm,
        "patch_embedding.bias": config.patch_bias,
    }
    prefixes = tuple(name for name, built in left_out.items() if not built)
    yield from (rule for rule in mapping.embeddings if not rule.ours.startswith(prefixes))
    for layer in range(config.num_layers):
        yield from (rule.at(layer) for rule in mapping.blocks)


def _mismatch(family: str, *, config: VisionConfig, missing: Sequence[str], surplus: Sequence[str]) -> str:
    faults = [
        f"{what} {len(names)} tensors ({', '.join(names[:3])}{', ..' if len(names) > 3 else ''})"
        for what, names in (("lack", missing), ("have no place for", surplus))
        if names
    ]
    return (
        f"these weights are not a {family} image encoder of {config.num_layers} blocks as model.vision describes it: "
        f"they {' and '.join(faults)}; check the family, model.vision and the prefix of the names"
    )
