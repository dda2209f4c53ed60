"""A whole LlavaForConditionalGeneration of transformers, and ours with the `mlp` connector."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron_mm1.checkpoint.decoder_configs import DECODERS, export_decoder_config, import_decoder_config
from megatron_mm1.checkpoint.decoders import decoder_correspondence
from megatron_mm1.checkpoint.rules import Correspondence, same
from megatron_mm1.checkpoint.tower_configs import export_tower_config, import_tower_config
from megatron_mm1.checkpoint.towers import tower_correspondence
from megatron_mm1.config.derived import num_patches
from megatron_mm1.config.schema import ModelConfig
from megatron_mm1.errors import UserError

Config = Mapping[str, Any]

OURS = "connector."
_TOWERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
_DEFAULTS: Config = {
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}
_VISION_DEFAULTS: Config = {
    "model_type": "clip_vision_model",
    "intermediate_size": 4096,
    "hidden_size": 1024,
    "patch_size": 14,
    "image_size": 336,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
"""Of a LLaVA whose configuration says nothing of its tower."""


def llava_correspondence(model: ModelConfig) -> Correspondence:
    """The tensors of a whole model; names of theirs as transformers writes them to files, the tower's behind
    `vision_model.` as version 4 does (5 leaves that out, and reads both).
    """
    vision, hidden = model.vision, model.decoder.hidden_size
    decoder = decoder_correspondence(model, shared_expert_gate=DECODERS[_decoder_family(model)].shared_expert)
    projector = "multi_modal_projector."
    shapes = {
        "linear_1.weight": (hidden, vision.hidden_size),
        "linear_1.bias": (hidden,),
        "linear_2.weight": (hidden, hidden),
        "linear_2.bias": (hidden,),
    }
    rules = tuple(same(f"{OURS}{name}", f"{projector}{name}", shape) for name, shape in shapes.items())
    return (
        tower_correspondence(_tower_family(model), vision).renamed(lambda name: f"vision_tower.vision_model.{name}")
        + Correspondence(rules, components=(OURS,))
        + decoder.renamed(lambda name: f"language_model.{name}")
    )


def file_name(name: str) -> str:
    """The name in `llava_correspondence` of a tensor that is called `name` in memory or in a file of any version."""
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    name = re.sub(r"^model\.(vision_tower|multi_modal_projector)\.", r"\1.", name)
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def import_llava_config(theirs: Config, *, base: ModelConfig, seq_length: int | None) -> ModelConfig:
    """`base` with the tower, connector and decoder that `theirs` describes.

    Raises:
        UserError: every reason why it cannot be one of ours.
    """
    values = {**_DEFAULTS, **theirs}
    vision = {**_VISION_DEFAULTS, **(values.get("vision_config") or {})}
    text = {"model_type": "llama", **(values.get("text_config") or {})}
    if reasons := list(_unsupported(values, vision, text)):
        raise UserError("\n  ".join(["this LLaVA cannot be an MM1 with an mlp connector:", *reasons]))
    text["tie_word_embeddings"] = values["tie_word_embeddings"] or text.get("tie_word_embeddings", False)
    model = import_decoder_config(text, base=base, seq_length=seq_length)
    tower = import_tower_config(
        _TOWERS[vision["model_type"]],
        vision,
        base=replace(base.vision, feature_layer=values["vision_feature_layer"], final_layernorm=False),
    )
    connector = replace(base.connector, connector="mlp", tokens_per_image=num_patches(tower), options={})
    return replace(model, vision=tower, connector=connector)


def _unsupported(values: Config, vision: Config, text: Config) -> Iterator[str]:
    layer, strategy = values["vision_feature_layer"], values["vision_feature_select_strategy"]
    layers = vision["num_hidden_layers"]
    if text["model_type"] not in DECODERS:
        yield f"text_config.model_type {text['model_type']}: supported are {', '.join(DECODERS)}"
    if vision["model_type"] not in _TOWERS:
        yield f"vision_config.model_type {vision['model_type']}: supported are {', '.join(_TOWERS)}"
    elif strategy != (wanted := "default" if vision["model_type"] == "clip_vision_model" else "full"):
        yield f"vision_feature_select_strategy {strategy}: image tokens here are the patches, which is {wanted}"
    if not isinstance(layer, int) or not -layers <= layer <= -1:
        yield f"vision_feature_layer {layer}: supported is one block, -1 (the last) to {-layers} (the first)"
    if values["projector_hidden_act"] != "gelu":
        yield f"projector_hidden_act {values['projector_hidden_act']}: supported is gelu"
    if not values["multimodal_projector_bias"]:
        yield "multimodal_projector_bias false: the connector's linear layers have biases"


def export_llava_config(
    model: ModelConfig, *, seq_length: int, image_token_id: int | None, dtype: str
) -> dict[str, Any]:
    """config.json of a whole model as a LLaVA. Its tower ends with the block that `feature_layer` names.

    Args:
        image_token_id: of the token that stands for each patch of an image in its input.

    Raises:
        UserError: every reason why it cannot be one.
    """
    if reasons := list(_inexpressible(model, image_token_id)):
        raise UserError("\n  ".join(["this model cannot be a LLaVA:", *reasons]))
    vision = export_tower_config(_tower_family(model), replace(model.vision, final_layernorm=True), dtype=dtype)
    text = export_decoder_config(DECODERS[_decoder_family(model)], model, seq_length=seq_length, dtype=dtype)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": dtype,
        "torch_dtype": dtype,  # the same for transformers 4
        "image_seq_length": num_patches(model.vision),
        "image_token_index": image_token_id,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "vision_config": vision,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if model.vision.class_token else "full",
    }


def _inexpressible(model: ModelConfig, image_token_id: int | None) -> Iterator[str]:
    if model.connector.connector != "mlp":
        yield f"connector.connector is {model.connector.connector}, it takes mlp"
    if model.vision.final_layernorm:
        yield "vision.final_layernorm is True, it takes features as the tower's last block leaves them"
    if image_token_id is None:
        yield "it marks the places of images by a token: say which (the tokenizer's image token)"
    elif not 0 <= image_token_id < model.decoder.vocab_size:
        yield f"its image token {image_token_id} has to be one of the vocabulary of {model.decoder.vocab_size}"


def _tower_family(model: ModelConfig) -> str:
    return "clip" if model.vision.class_token else "siglip"


def _decoder_family(model: ModelConfig) -> str:
    """The family that a decoder goes by without a loss."""
    decoder = model.decoder
    if model.moe is not None:
        return "qwen3_moe" if decoder.qk_layernorm else "qwen2_moe"
    if decoder.qk_layernorm:
        return "qwen3"
    return "qwen2" if decoder.add_qkv_bias else "llama"
