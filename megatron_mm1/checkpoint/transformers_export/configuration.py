"""config.json of the exported folder from our configuration, and back."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_mm1.checkpoint.decoder_configs import LLAMA3_ROPE
from megatron_mm1.config.derived import expert_ffn_size, head_dim, num_query_groups
from megatron_mm1.config.schema import ConnectorConfig, DecoderConfig, ModelConfig, MoEConfig, VisionConfig
from megatron_mm1.errors import UserError
from megatron_mm1.model.connectors import CONNECTORS
from megatron_mm1.model.vision import TOWERS

MODEL_TYPE = "mm1"
_MODEL_CLASS = "modeling_mm1.MM1ForConditionalGeneration"
_AUTO_MAP = {
    "AutoConfig": "configuration_mm1.MM1Config",
    "AutoModel": "modeling_mm1.MM1Model",
    "AutoModelForCausalLM": _MODEL_CLASS,
    "AutoModelForImageTextToText": _MODEL_CLASS,
}

# Our fields and theirs, one for one.
_VISION = {
    "tower": "tower",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "activation": "hidden_act",
    "layernorm_epsilon": "layer_norm_eps",
    "class_token": "use_class_token",
    "pre_layernorm": "use_pre_layernorm",
    "patch_bias": "use_patch_bias",
    "feature_layer": "vision_feature_layer",
    "final_layernorm": "use_post_layernorm",
    "image_resize": "image_resize",
    "image_mean": "image_mean",
    "image_std": "image_std",
}
_CONNECTOR = {
    "connector": "connector",
    "tokens_per_image": "tokens_per_image",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
}
_DECODER = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "unpadded_vocab_size",
    "layernorm_epsilon": "rms_norm_eps",
    "qk_layernorm": "use_qk_norm",
    "add_qkv_bias": "attention_bias",
    "init_method_std": "initializer_range",
}
_MOE = {
    "num_moe_experts": "num_experts",
    "moe_layer_freq": "decoder_sparse_step",
    "moe_router_topk": "num_experts_per_tok",
    "moe_router_score_function": "scoring_func",
    "moe_aux_loss_coeff": "router_aux_loss_coef",
    "moe_z_loss_coeff": "router_z_loss_coef",
    "moe_token_dispatcher_type": "token_dispatcher_type",
    "moe_expert_capacity_factor": "expert_capacity_factor",
    "moe_router_enable_expert_bias": "use_expert_bias",
    "moe_router_bias_update_rate": "expert_bias_update_rate",
}


def check_exportable(model: ModelConfig) -> None:
    """Refuse what the exported code cannot have.

    Raises:
        UserError: the tower or the connector is the user's own.
    """
    own = [
        f"{key} {name!r}"
        for key, name, builtin in (
            ("model.vision.tower", model.vision.tower, TOWERS),
            ("model.connector.connector", model.connector.connector, CONNECTORS),
        )
        if name not in builtin
    ]
    if own:
        raise UserError(
            f"cannot export {' and '.join(own)} to transformers: the exported modeling_mm1.py has the built-in towers "
            f"({', '.join(TOWERS)}) and connectors ({', '.join(CONNECTORS)}) only"
        )


def to_transformers(
    model: ModelConfig, *, vocab_rows: int, seq_length: int, special_ids: Mapping[str, int], dtype: str
) -> dict[str, Any]:
    """config.json.

    Args:
        vocab_rows: of the embeddings, padding included.
        special_ids: `image_token_id`, `bos_token_id`, `eos_token_id` and `pad_token_id`.
        dtype: of most weights, without "torch.".
    """
    decoder, moe = model.decoder, model.moe
    tied = not decoder.untie_embeddings_and_output_weights
    text = {
        "model_type": "mm1_text",
        **_renamed(decoder, _DECODER),
        "vocab_size": vocab_rows,
        "num_key_value_heads": num_query_groups(decoder),
        "head_dim": head_dim(decoder),
        "hidden_act": "silu",
        "max_position_embeddings": seq_length,
        "rope_parameters": _rope(decoder),
        "tie_word_embeddings": tied,
    }
    if moe is not None:
        text |= {
            **_renamed(moe, _MOE),
            "moe_intermediate_size": expert_ffn_size(model),
            "norm_topk_prob": _normalises(moe),
        }
    return {
        "architectures": ["MM1ForConditionalGeneration"],
        "auto_map": _AUTO_MAP,
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        **special_ids,
        "tie_word_embeddings": tied,
        "vision_config": {"model_type": "mm1_vision", **_renamed(model.vision, _VISION)},
        "connector_config": {"model_type": "mm1_connector", **_renamed(model.connector, _CONNECTOR)},
        "text_config": text,
    }


def from_transformers(config: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """The model of a config.json of `to_transformers`, and the rows of its embeddings.

    Raises:
        UserError: something is missing from it, or changed to what an MM1 cannot be.
    """
    if config.get("model_type") != MODEL_TYPE:
        raise UserError(f"this is no exported MM1: its model_type is {config.get('model_type')!r}, not {MODEL_TYPE!r}")
    try:
        vision, connector, text = (config[f"{part}_config"] for part in ("vision", "connector", "text"))
        decoder = {
            **_back(text, _DECODER),
            "num_query_groups": text["num_key_value_heads"],
            "kv_channels": text["head_dim"],
            **_rope_back(text["rope_parameters"]),
            "untie_embeddings_and_output_weights": not text["tie_word_embeddings"],
        }
        moe = None
        if text.get("num_experts"):
            moe = MoEConfig(
                **_back(text, _MOE),
                moe_ffn_hidden_size=text["moe_intermediate_size"],
                moe_router_pre_softmax=text["scoring_func"] == "softmax" and not text["norm_topk_prob"],
            )
        images = {key: tuple(vision[key]) for key in ("image_mean", "image_std")}
        model = ModelConfig(
            vision=VisionConfig(**{**_back(vision, _VISION), **images}),
            connector=ConnectorConfig(**_back(connector, _CONNECTOR)),
            decoder=DecoderConfig(**decoder),
            moe=moe,
        )
        return model, int(text["vocab_size"])
    except (KeyError, TypeError) as error:
        raise UserError(f"config.json is not one of an exported MM1: {error!r}") from error


def _rope(decoder: DecoderConfig) -> dict[str, Any]:
    if decoder.rope_scaling_factor is None:
        return {"rope_type": "default", "rope_theta": decoder.rotary_base}
    scaling = {"rope_type": "llama3", "factor": decoder.rope_scaling_factor, **LLAMA3_ROPE}
    return {**scaling, "rope_theta": decoder.rotary_base}


def _rope_back(parameters: Mapping[str, Any]) -> dict[str, Any]:
    kind = parameters["rope_type"]
    if kind not in ("default", "llama3") or (kind == "llama3" and not LLAMA3_ROPE.items() <= parameters.items()):
        raise UserError(f"rope_parameters {dict(parameters)}: supported are default, and llama3 with {LLAMA3_ROPE}")
    return {
        "rotary_base": parameters["rope_theta"],
        "rope_scaling_factor": parameters["factor"] if kind == "llama3" else None,
    }


def _normalises(moe: MoEConfig) -> bool:
    """Whether the weights of a token's experts sum to 1."""
    return not moe.moe_router_pre_softmax if moe.moe_router_score_function == "softmax" else moe.moe_router_topk > 1


def _renamed(part: Any, names: Mapping[str, str]) -> dict[str, Any]:
    values = asdict(part)
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {theirs: plain[ours] for ours, theirs in names.items()}


def _back(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: values[theirs] for ours, theirs in names.items()}
