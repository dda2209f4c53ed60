"""megatron-core's own LLaVAModel (`megatron.core.models.multimodal`) as an MM1 with the `mlp` connector.

Its distributed checkpoints name tensors `vision_model.*`, `vision_projection.*` and `language_model.*`. A layer is a
whole transformer layer, where ours are attention and feed-forward apart; layers have numbers, or one tensor holds those
of all (megatron-core's `non_homogeneous_layers`). Weights inside a layer are the same megatron-core modules as ours and
go over as they are: queries, keys and values by query group, gates before what they gate.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import isqrt

import torch
from torch import Tensor

from megatron_mm1.checkpoint.model_check import model_problems
from megatron_mm1.checkpoint.tensors import Piece, Plan, PlannedTensor, TensorInfo, TensorSource
from megatron_mm1.config import ConnectorConfig, DecoderConfig, ModelConfig, VisionConfig
from megatron_mm1.config.derived import head_dim, num_patches, num_query_groups, padded_vocab_size
from megatron_mm1.errors import ConfigError, UserError

VISION, PROJECTION, LANGUAGE = "vision_model.", "vision_projection.encoder.", "language_model."
_PARTS = ("vision_model.", "vision_projection.", "language_model.", "sound_model.", "sound_projection.")
_LAYERS = "decoder.layers."
_LOCAL_NORMS = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}
"""A layer's norms by the names of the local layer specs, and by Transformer Engine's, which ours are. As in
model/vision.py, which a conversion does not import: megatron-core takes seconds."""

_NEEDED = {
    f"{VISION}conv1.weight": 4,
    f"{VISION}position_embeddings.weight": 2,
    f"{VISION}{_LAYERS}0.mlp.linear_fc1.weight": 2,
    f"{PROJECTION}linear_fc1.weight": 2,
    f"{LANGUAGE}embedding.word_embeddings.weight": 2,
    f"{LANGUAGE}{_LAYERS}0.self_attention.linear_qkv.weight": 2,
    f"{LANGUAGE}{_LAYERS}0.self_attention.linear_proj.weight": 2,
    f"{LANGUAGE}{_LAYERS}0.mlp.linear_fc2.weight": 2,
}
"""Whose shapes say the model's, and their number of dimensions."""

_FOREIGN = {
    r"sound_": "sound",
    r"language_model\..*(experts|router)": "experts in the decoder",
    r"language_model\..*position_embeddings": "learned positions in the decoder, which ours rotates",
    r"language_model\..*norm.*bias": "LayerNorm in the decoder, whose norms are RMSNorm",
    r"language_model\..*bias": "biases in the decoder, which has none but of queries, keys and values",
    r"vision_projection\.encoder\.(weight|bias)": "an affine projection, where the mlp connector has two layers",
    r"vision_projection\..*layer_norm": "a norm in the projection",
}
"""What a tensor that an MM1 has no place for is a sign of."""


@dataclass(frozen=True)
class _Theirs:
    """One of their tensors, or a layer's part of one that holds those of all layers."""

    source: TensorSource
    name: str
    layer: int | None
    info: TensorInfo

    def read(self) -> Tensor:
        if self.layer is None:
            return self.source.read(self.name)
        return self.source.read(self.name, slice(self.layer, self.layer + 1))[0]

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.name}[{self.layer}]"


@dataclass(frozen=True)
class _Rule:
    """Where one of our tensors comes from.

    Attributes:
        needs: the shape theirs has to have.
        becomes: ours: the same numbers, or more rows, which are zeros; None: as theirs.
        optional: where they have none, ours is zeros.
    """

    theirs: str
    ours: str
    needs: tuple[int, ...]
    becomes: tuple[int, ...] | None = None
    optional: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.needs if self.becomes is None else self.becomes


def import_megatron_llava(source: TensorSource, *, base: ModelConfig) -> tuple[ModelConfig, Plan]:
    """An MM1 from the weights of megatron-core's LLaVAModel.

    Its tower is a CLIPViTModel (`clip`, `siglip` or `internvit`), its projection the `mlp` one, as wide as the decoder
    and without a gate, its decoder a GPTModel with RMSNorm, SwiGLU, rotary positions and no experts. What shapes do not
    say has to be so: class tokens are dropped (`drop_vision_class_token`), images are square and one tile, the
    projection's activation is the exact GELU, and RoPE is neither scaled nor interleaved.

    LLaVAModel takes the output of its tower's last layer, without a last norm (SigLIP's apart); where it stands for an
    earlier layer of a pretrained tower, the later ones are not in its checkpoint. So `feature_layer` becomes -1.

    Shapes do not say how many heads there are; with another number the import succeeds as long as it divides, and the
    model computes something else.

    Args:
        source: a checkpoint's tensors; those of optimizer and schedule are not looked at.
        base: attention heads, epsilons, the tower's activation, rotary base and image statistics are taken from it;
            what shapes say takes the place of the rest, but for num_query_groups and kv_channels: where it has them,
            they must be the model's.

    Returns:
        The model and its tensors, in the dtypes they have. Rows of zeros pad the vocabulary to a multiple of 128, and
        stand for biases that the projection lacks.

    Raises:
        ConfigError: `base` has other numbers of heads, or the images are not square.
        UserError: tensors are missing, misshapen or have no place in an MM1; all are named.
    """
    theirs = _by_layer(source)
    missing = [name for name, dims in _NEEDED.items() if name not in theirs or len(theirs[name].info.shape) != dims]
    if missing:
        raise UserError(
            f"these weights are no LLaVAModel with a CLIPViTModel, an mlp projection and a GPTModel{_signs(theirs)}: "
            f"without {', '.join(missing)}"
        )
    model = _configuration(theirs, base)
    rules = [*_tower(model.vision), *_connector(model), *_decoder(model.decoder)]
    _check(rules, theirs, model.vision.hidden_size)
    return model, [_planned(rule, theirs) for rule in rules]


def _by_layer(source: TensorSource) -> dict[str, _Theirs]:
    """The model's tensors by their names with numbered layers and Transformer Engine's names of norms."""
    found = {}
    for name, info in source.tensors.items():
        if not name.startswith(_PARTS):
            continue
        plain = name
        for local, fused in _LOCAL_NORMS.items():
            plain = plain.replace(local, fused)
        before, layers, after = plain.partition(_LAYERS)
        if not layers or re.match(r"\d+\.", after) or not info.shape:
            found[plain] = _Theirs(source, name, None, info)
            continue
        for layer in range(info.shape[0]):
            part = TensorInfo(info.shape[1:], info.dtype)
            found[f"{before}{layers}{layer}.{after}"] = _Theirs(source, name, layer, part)
    return found


def _configuration(theirs: Mapping[str, _Theirs], base: ModelConfig) -> ModelConfig:
    """What shapes say, and `base` beside it.

    Raises:
        ConfigError: no model can be like that.
    """
    shape = {name: theirs[name].info.shape for name in _NEEDED}
    vision, decoder = base.vision, base.decoder
    width, _, patch, _ = shape[f"{VISION}conv1.weight"]
    has_class_token = f"{VISION}class_token" in theirs
    patches = shape[f"{VISION}position_embeddings.weight"][0] - has_class_token
    queries = shape[f"{LANGUAGE}{_LAYERS}0.self_attention.linear_proj.weight"][1]
    rows = shape[f"{LANGUAGE}{_LAYERS}0.self_attention.linear_qkv.weight"][0]
    hidden, heads = shape[f"{LANGUAGE}embedding.word_embeddings.weight"][1], decoder.num_attention_heads
    problems = []
    if patches < 1 or isqrt(patches) ** 2 != patches:
        problems.append(f"the tower has {patches} positions for patches, which are no square: MM1's images are")
    dim = queries // heads if heads > 0 else 0
    groups = (rows // dim - heads) // 2 if dim else 0
    if groups < 1 or (heads * dim, (heads + 2 * groups) * dim) != (queries, rows):
        problems.append(
            f"model.decoder.num_attention_heads {heads} does not go with projections of {rows} rows (queries, keys and "
            f"values) and {queries} columns (queries): set it to the model's"
        )
    for name, value in (("num_query_groups", groups), ("kv_channels", dim)) if not problems else ():
        if getattr(decoder, name) not in (None, value):
            problems.append(
                f"model.decoder.num_attention_heads {heads} and the shapes make {name} {value}, not "
                f"{getattr(decoder, name)}: change one of them, or leave {name} null"
            )
    if problems:
        raise ConfigError(problems)
    model = ModelConfig(
        vision=replace(
            vision,
            tower="vit",
            image_size=isqrt(patches) * patch,
            patch_size=patch,
            num_layers=_num_layers(theirs, VISION),
            hidden_size=width,
            ffn_hidden_size=shape[f"{VISION}{_LAYERS}0.mlp.linear_fc1.weight"][0],
            class_token=has_class_token,
            pre_layernorm=f"{VISION}ln_pre.weight" in theirs,
            patch_bias=f"{VISION}conv1.bias" in theirs,
            feature_layer=-1,
            final_layernorm=f"{VISION}ln_post.weight" in theirs,
        ),
        connector=ConnectorConfig(connector="mlp", tokens_per_image=patches),
        decoder=replace(
            decoder,
            num_layers=_num_layers(theirs, LANGUAGE),
            hidden_size=hidden,
            ffn_hidden_size=shape[f"{LANGUAGE}{_LAYERS}0.mlp.linear_fc2.weight"][1],
            num_query_groups=None if groups == heads else groups,
            kv_channels=None if dim * heads == hidden else dim,
            vocab_size=shape[f"{LANGUAGE}embedding.word_embeddings.weight"][0],
            qk_layernorm=f"{LANGUAGE}{_LAYERS}0.self_attention.q_layernorm.weight" in theirs,
            add_qkv_bias=f"{LANGUAGE}{_LAYERS}0.self_attention.linear_qkv.bias" in theirs,
            untie_embeddings_and_output_weights=f"{LANGUAGE}output_layer.weight" in theirs,
        ),
    )
    if more := model_problems(model):
        raise ConfigError(more)
    return model


def _num_layers(theirs: Mapping[str, _Theirs], part: str) -> int:
    prefix = f"{part}{_LAYERS}"
    return len({name.removeprefix(prefix).split(".")[0] for name in theirs if name.startswith(prefix)})


def _tower(vision: VisionConfig) -> Iterator[_Rule]:
    width, ffn, patch = vision.hidden_size, vision.ffn_hidden_size, vision.patch_size
    if vision.class_token:
        yield _Rule(f"{VISION}class_token", "tower.class_token", (1, 1, width), (width,))
    positions = vision.class_token + num_patches(vision)
    yield _Rule(f"{VISION}position_embeddings.weight", "tower.position_embeddings", (positions, width))
    yield _Rule(f"{VISION}conv1.weight", "tower.patch_embedding.weight", (width, 3, patch, patch))
    if vision.patch_bias:
        yield _Rule(f"{VISION}conv1.bias", "tower.patch_embedding.bias", (width,))
    norms = {"ln_pre": ("pre_layernorm", vision.pre_layernorm), "ln_post": ("final_layernorm", vision.final_layernorm)}
    for theirs, (ours, is_there) in norms.items():
        for part in ("weight", "bias") if is_there else ():
            yield _Rule(f"{VISION}{theirs}.{part}", f"tower.{ours}.{part}", (width,))
    of_layer = {
        "self_attention.linear_qkv.layer_norm_weight": (width,),
        "self_attention.linear_qkv.layer_norm_bias": (width,),
        "self_attention.linear_qkv.weight": (3 * width, width),
        "self_attention.linear_qkv.bias": (3 * width,),
        "self_attention.linear_proj.weight": (width, width),
        "self_attention.linear_proj.bias": (width,),
        "mlp.linear_fc1.layer_norm_weight": (width,),
        "mlp.linear_fc1.layer_norm_bias": (width,),
        "mlp.linear_fc1.weight": (ffn, width),
        "mlp.linear_fc1.bias": (ffn,),
        "mlp.linear_fc2.weight": (width, ffn),
        "mlp.linear_fc2.bias": (width,),
    }
    for layer in range(vision.num_layers):
        for name, shape in of_layer.items():
            yield _Rule(f"{VISION}{_LAYERS}{layer}.{name}", f"tower.encoder.layers.{layer}.{name}", shape)


def _connector(model: ModelConfig) -> Iterator[_Rule]:
    hidden = model.decoder.hidden_size
    for theirs, ours, width in (
        ("linear_fc1", "linear_1", model.vision.hidden_size),
        ("linear_fc2", "linear_2", hidden),
    ):
        yield _Rule(f"{PROJECTION}{theirs}.weight", f"connector.{ours}.weight", (hidden, width))
        yield _Rule(f"{PROJECTION}{theirs}.bias", f"connector.{ours}.bias", (hidden,), optional=True)


def _decoder(decoder: DecoderConfig) -> Iterator[_Rule]:
    hidden, ffn, dim, vocabulary = decoder.hidden_size, decoder.ffn_hidden_size, head_dim(decoder), decoder.vocab_size
    queries, padded = decoder.num_attention_heads * dim, (padded_vocab_size(vocabulary), hidden)
    rows = queries + 2 * num_query_groups(decoder) * dim
    embedding = f"{LANGUAGE}embedding.word_embeddings.weight"
    yield _Rule(embedding, embedding, (vocabulary, hidden), padded)
    attention = {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "self_attention.linear_qkv.weight": (rows, hidden),
        "self_attention.linear_proj.weight": (hidden, queries),
    }
    if decoder.add_qkv_bias:
        attention["self_attention.linear_qkv.bias"] = (rows,)
    if decoder.qk_layernorm:
        attention |= {f"self_attention.{part}_layernorm.weight": (dim,) for part in "qk"}
    feed_forward = {
        "mlp.linear_fc1.layer_norm_weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }
    for block in range(decoder.num_layers):
        for layer, tensors in ((2 * block, attention), (2 * block + 1, feed_forward)):
            for name, shape in tensors.items():
                yield _Rule(f"{LANGUAGE}{_LAYERS}{block}.{name}", f"{LANGUAGE}{_LAYERS}{layer}.{name}", shape)
    yield _Rule(f"{LANGUAGE}decoder.final_layernorm.weight", f"{LANGUAGE}decoder.final_norm.weight", (hidden,))
    if decoder.untie_embeddings_and_output_weights:
        yield _Rule(f"{LANGUAGE}output_layer.weight", f"{LANGUAGE}output_layer.weight", (vocabulary, hidden), padded)


def _check(rules: list[_Rule], theirs: Mapping[str, _Theirs], vision_hidden_size: int) -> None:
    """Raises UserError with all that does not fit; what is the same in several layers is said once."""
    faults: dict[str, int] = {}

    def add(name: str, what: str) -> None:
        fault = re.sub(r"(?<=layers\.)\d+", "*", name) + what
        faults[fault] = faults.get(fault, 0) + 1

    for rule in rules:
        if rule.theirs not in theirs:
            if not rule.optional:
                add(rule.theirs, " is missing")
        elif (shape := theirs[rule.theirs].info.shape) != rule.needs:
            shuffled = rule.ours == "connector.linear_1.weight" and shape[-1] == 4 * vision_hidden_size
            why = " (pixel shuffle, which an MM1 does not have)" if shuffled else ""
            add(rule.theirs, f" has shape {shape}, an MM1 needs {rule.needs}{why}")
    surplus = sorted(set(theirs) - {rule.theirs for rule in rules})
    for name in surplus:
        add(name, " has no place in an MM1")
    if faults:
        lines = [fault + (f" (in {count} layers)" if count > 1 else "") for fault, count in faults.items()]
        raise UserError("this LLaVAModel cannot be an MM1" + _signs(surplus) + ":\n  - " + "\n  - ".join(lines))


def _signs(names: Iterable[str]) -> str:
    """What these tensors show a model to have, for a message."""
    found = {sign for name in names for pattern, sign in _FOREIGN.items() if re.match(pattern, name)}
    return f": it has {'; '.join(sorted(found))}" if found else ""


def _planned(rule: _Rule, theirs: Mapping[str, _Theirs]) -> PlannedTensor:
    if rule.theirs not in theirs:
        info = TensorInfo(rule.shape, theirs[rule.theirs.replace(".bias", ".weight")].info.dtype)
        return PlannedTensor(rule.ours, info, ("zeros",), (_zeros(info.shape, info.dtype),))
    source = theirs[rule.theirs]
    info = TensorInfo(rule.shape, source.info.dtype)
    padding = rule.shape[0] - rule.needs[0] if len(rule.shape) == len(rule.needs) else 0
    read = source.read if padding else lambda: source.read().view(rule.shape)
    pieces = [Piece(rule.shape[0] - padding, read)]
    if padding:
        pieces.append(_zeros((padding, *rule.shape[1:]), info.dtype))
    return PlannedTensor(rule.ours, info, (str(source),), tuple(pieces))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Piece:
    return Piece(shape[0], lambda: torch.zeros(shape, dtype=dtype))
