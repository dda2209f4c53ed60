"""Configurations of transformers' and open_clip's image encoders and ours, in both directions."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from megatron_mm1.config.derived import num_vision_blocks
from megatron_mm1.config.schema import VisionConfig
from megatron_mm1.errors import UserError

Config = Mapping[str, Any]

ACTIVATIONS: Mapping[str, Literal["quick_gelu", "gelu", "gelu_tanh"]] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""transformers' names and ours; on export the first of those that mean the same."""

_COMMON: Config = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
}
DEFAULTS: Mapping[str, Config] = {
    "clip": {**_COMMON, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip": {**_COMMON, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "open_clip": {
        "layers": 12,
        "width": 768,
        "head_width": 64,
        "mlp_ratio": 4.0,
        "patch_size": 16,
        "image_size": 224,
        "no_ln_pre": False,
    },
}
"""What transformers and open_clip take where a configuration says nothing."""

_CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
PIXELS = {"clip": _CLIP_PIXELS, "open_clip": _CLIP_PIXELS, "siglip": ((0.5,) * 3, (0.5,) * 3)}
"""Mean and standard deviation of the pixels the published models were trained on."""

_RESIZES: Mapping[Any, Literal["squash", "shorter_side_crop"]] = {"squash": "squash", "shortest": "shorter_side_crop"}
"""open_clip's names of how an image becomes a square, and ours; transformers' vision configuration does not say. Its
"longest" is not our "pad": it resizes before it pads, which gives other pixels at the edges."""

_OPEN_CLIP_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attentional_pool": (False, None),
    "block_type": (None, "default"),
    "final_ln_after_pool": (False, None),
    "ls_init_value": (None,),
    "pos_embed_type": ("learnable",),
    "qk_norm": (False, None),
    "scale_attn": (False, None),
    "scale_attn_inner": (False, None),
    "scale_fc": (False, None),
    "scale_heads": (False, None),
    "scaled_cosine_attn": (False, None),
    "timm_model_name": (None, ""),
}


def import_tower_config(family: str, theirs: Config, *, base: VisionConfig) -> VisionConfig:
    """`base` with the tower that `theirs` describes: transformers' vision configuration, or open_clip's whole one.

    Which block's output is the image feature, and whether the last norm applies to it, stays as in `base`.

    Raises:
        UserError: every reason why this trainer's tower cannot be that model.
    """
    values, pixels = (
        _open_clip_values(theirs) if family == "open_clip" else ({**DEFAULTS[family], **theirs}, PIXELS[family])
    )
    if reasons := list(_unsupported(values)):
        raise UserError("\n  ".join([f"this {family} image encoder cannot be an MM1 tower:", *reasons]))
    clip = family != "siglip"
    return replace(
        base,
        tower="vit",
        image_size=_side(values["image_size"]),
        patch_size=_side(values["patch_size"]),
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["intermediate_size"],
        num_attention_heads=values["num_attention_heads"],
        activation=ACTIVATIONS[values["hidden_act"]],
        layernorm_epsilon=values["layer_norm_eps"],
        class_token=clip,
        pre_layernorm=clip and not values.get("no_ln_pre", False),
        patch_bias=not clip,
        image_resize=_RESIZES.get(values.get("resize_mode"), base.image_resize),
        image_mean=pixels[0],
        image_std=pixels[1],
    )


def _unsupported(values: Config) -> Iterator[str]:
    for key, neutral in _OPEN_CLIP_NEUTRAL.items():
        if key in values and values[key] not in neutral:
            yield f"{key} {values[key]}: there is no counterpart, supported is {neutral[0]}"
    if not isinstance(values["num_hidden_layers"], int):
        yield f"layers {values['num_hidden_layers']}: that is a ResNet, supported are vision transformers"
    if values["hidden_act"] not in ACTIVATIONS:
        yield f"activation {values['hidden_act']}: supported are {', '.join(ACTIVATIONS)}"
    if values.get("resize_mode") not in (None, *_RESIZES):
        yield f"resize_mode {values['resize_mode']}: supported are {', '.join(_RESIZES)}"
    if values.get("interpolation") not in (None, "bicubic"):
        yield f"interpolation {values['interpolation']}: images are resized bicubically here"
    if values["num_channels"] != 3:
        yield f"num_channels {values['num_channels']}: images here have 3"
    for key in ("image_size", "patch_size"):
        if isinstance(values[key], list | tuple) and len(set(values[key])) > 1:
            yield f"{key} {list(values[key])}: supported are squares"
    if values.get("quantization_config"):
        yield "quantization_config: supported are plain floating-point weights"


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)


def _open_clip_values(theirs: Config) -> tuple[dict[str, Any], tuple[Any, Any]]:
    """open_clip's configuration by transformers' keys, and the pixels' mean and standard deviation."""
    model = theirs.get("model_cfg", theirs)
    values = {**DEFAULTS["open_clip"], **model["vision_cfg"]}
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    if arguments := values.get("act_kwargs"):
        tanh = activation == "gelu" and arguments == {"approximate": "tanh"}
        activation = "gelu_pytorch_tanh" if tanh else f"{activation} with {arguments}"
    norm = values.get("norm_kwargs") or {}
    pixels = theirs.get("preprocess_cfg", {})
    mean, std = PIXELS["open_clip"]
    width, head_width = values["width"], values["head_width"]
    values |= {
        "hidden_size": width,
        "intermediate_size": int(width * values["mlp_ratio"]),
        "num_hidden_layers": values["layers"],
        "num_attention_heads": width // head_width,
        "num_channels": 3,
        "resize_mode": pixels.get("resize_mode"),
        "interpolation": pixels.get("interpolation"),
        "hidden_act": activation,
        "layer_norm_eps": norm.get("eps", 1e-5),
    }
    return values, (tuple(pixels.get("mean", mean)), tuple(pixels.get("std", std)))


def export_tower_config(family: str, vision: VisionConfig, *, dtype: str) -> dict[str, Any]:
    """config.json of a tower as a model of `family`; for open_clip its open_clip_config.json, without a text encoder.

    Theirs has the blocks that ours has: those after `feature_layer` are gone.

    Raises:
        UserError: every reason why it cannot be one.
    """
    if reasons := list(inexpressible(family, vision)):
        raise UserError("\n  ".join([f"this tower cannot be a {family} image encoder:", *reasons]))
    if family == "open_clip":
        return _export_open_clip(vision)
    theirs = {
        "architectures": ["CLIPVisionModel" if family == "clip" else "SiglipVisionModel"],
        "model_type": f"{family}_vision_model",
        "dtype": dtype,
        "torch_dtype": dtype,  # the same for transformers 4
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": num_vision_blocks(vision),
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == vision.activation),
        "layer_norm_eps": vision.layernorm_epsilon,
    }
    return theirs if family == "clip" else {**theirs, "vision_use_head": False}


def _export_open_clip(vision: VisionConfig) -> dict[str, Any]:
    cfg: dict[str, Any] = {
        "layers": num_vision_blocks(vision),
        "width": vision.hidden_size,
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "mlp_ratio": vision.ffn_hidden_size / vision.hidden_size,
        "patch_size": vision.patch_size,
        "image_size": vision.image_size,
        "no_ln_pre": not vision.pre_layernorm,
        "norm_kwargs": {"eps": vision.layernorm_epsilon},
    }
    if vision.activation == "gelu_tanh":
        cfg["act_kwargs"] = {"approximate": "tanh"}
    return {
        "model_cfg": {
            "embed_dim": vision.hidden_size,
            "quick_gelu": vision.activation == "quick_gelu",
            "vision_cfg": cfg,
        },
        "preprocess_cfg": {
            "mean": list(vision.image_mean),
            "std": list(vision.image_std),
            "interpolation": "bicubic",
            "resize_mode": next(theirs for theirs, ours in _RESIZES.items() if ours == vision.image_resize),
        },
    }


def inexpressible(family: str, vision: VisionConfig) -> Iterator[str]:
    """Why a tower cannot be a model of `family`."""
    if vision.tower != "vit":
        yield f"vision.tower is {vision.tower}, it can be the built-in vit only"
    parts: dict[str, tuple[bool, ...]] = {
        "class_token": (family != "siglip",),
        "patch_bias": (family == "siglip",),
        "pre_layernorm": {"clip": (True,), "siglip": (False,), "open_clip": (True, False)}[family],
        # CLIP gives features before its last norm, which is for the pooled token; the others after it.
        "final_layernorm": (True, False) if family == "clip" else (True,),
    }
    for name, takes in parts.items():
        if getattr(vision, name) not in takes:
            yield f"vision.{name} is {getattr(vision, name)}, it takes {takes[0]}"
    if family == "open_clip":
        width, ffn = vision.hidden_size, vision.ffn_hidden_size
        if int(width * (ffn / width)) != ffn:
            yield f"vision.ffn_hidden_size {ffn} is no ratio to hidden_size {width} that gives it back"
        if vision.image_resize not in _RESIZES.values():
            yield f"vision.image_resize is {vision.image_resize}, it takes {', '.join(_RESIZES.values())}"
