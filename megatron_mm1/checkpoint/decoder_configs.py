"""Configurations of transformers' decoders and ours, in both directions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_mm1.config.derived import expert_ffn_size, head_dim, num_query_groups
from megatron_mm1.config.schema import DecoderConfig, ModelConfig, MoEConfig
from megatron_mm1.errors import UserError

Config = Mapping[str, Any]

_COMMON: Config = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_QWEN: Config = {
    **_COMMON,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_MOE: Config = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
}


@dataclass(frozen=True, kw_only=True)
class DecoderFamily:
    """What sets a family apart.

    Attributes:
        architecture: transformers' class with an output layer.
        defaults: what transformers takes where config.json says nothing.
        qkv_bias: whether it has one; None: as its configuration says.
        shared_expert: it has one beside the others, which must be without width.
    """

    model_type: str
    architecture: str
    defaults: Config = field(repr=False)
    qkv_bias: bool | None = False
    qk_norm: bool = False
    experts: bool = False
    shared_expert: bool = False


DECODERS: Mapping[str, DecoderFamily] = {
    family.model_type: family
    for family in (
        DecoderFamily(
            model_type="llama",
            architecture="LlamaForCausalLM",
            defaults={
                **_COMMON,
                "vocab_size": 32000,
                "intermediate_size": 11008,
                "max_position_embeddings": 2048,
                "attention_bias": False,
                "mlp_bias": False,
            },
        ),
        DecoderFamily(
            model_type="mistral",
            architecture="MistralForCausalLM",
            defaults={
                **_COMMON,
                "vocab_size": 32000,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "sliding_window": 4096,
            },
        ),
        DecoderFamily(
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            defaults={**_QWEN, "max_window_layers": 28},
            qkv_bias=True,
        ),
        DecoderFamily(
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            defaults={**_QWEN, "max_window_layers": 28, "head_dim": 128, "attention_bias": False},
            qk_norm=True,
        ),
        DecoderFamily(
            model_type="qwen2_moe",
            architecture="Qwen2MoeForCausalLM",
            defaults={
                **_QWEN,
                **_MOE,
                "intermediate_size": 5632,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "num_experts": 60,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 1408,
                "shared_expert_intermediate_size": 5632,
                "qkv_bias": True,
            },
            qkv_bias=None,
            experts=True,
            shared_expert=True,
        ),
        DecoderFamily(
            model_type="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            defaults={
                **_QWEN,
                **_MOE,
                "intermediate_size": 6144,
                "num_key_value_heads": 4,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "attention_bias": False,
            },
            qk_norm=True,
            experts=True,
        ),
    )
}

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "embedding_multiplier": (1.0, None),
    "final_logit_softcapping": (None,),
    "hidden_act": ("silu", "swish"),
    "logit_scale": (1.0, None),
    "logits_scaling": (1.0, None),
    "mlp_bias": (False, None),
    "mlp_only_layers": ([], None),
    "no_rope_layers": (None,),
    "quantization_config": (None,),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (1.0, None),
    "scale_depth": (None,),
    "scale_emb": (1.0, None),
    "shared_expert_intermediate_size": (0,),
}
"""Settings this trainer's decoder has no counterpart of, and the values that mean it needs none."""


def import_decoder_config(theirs: Config, *, base: ModelConfig, seq_length: int | None) -> ModelConfig:
    """`base` with the decoder that `theirs` (config.json of a family in DECODERS) describes.

    Of experts, what concerns training alone (losses, capacity, dispatcher) stays as in `base`.

    Args:
        seq_length: positions the model will see; None: as many as it was made for.

    Raises:
        UserError: every reason why this trainer's decoder cannot be that model.
    """
    family = DECODERS[theirs["model_type"]]
    values = {**family.defaults, **theirs}
    values["num_experts"] = theirs.get("num_experts", theirs.get("num_local_experts", values.get("num_experts")))
    rope = _rope(values)
    positions = values["max_position_embeddings"] if seq_length is None else seq_length
    reasons = [*_unsupported(family, values), *_unsupported_rope(rope), *_short_window(family, values, positions)]
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    dim, groups = values["head_dim"] or hidden // heads, values["num_key_value_heads"] or heads
    if reasons:
        raise UserError("\n  ".join([f"this {family.model_type} cannot be trained as an MM1 decoder:", *reasons]))
    decoder = DecoderConfig(
        num_layers=values["num_hidden_layers"],
        hidden_size=hidden,
        ffn_hidden_size=values["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=groups if groups != heads else None,
        kv_channels=None if dim * heads == hidden else dim,
        vocab_size=values["vocab_size"],
        rotary_base=float(rope["rope_theta"]),
        rope_scaling_factor=float(rope["factor"]) if rope["rope_type"] == "llama3" else None,
        layernorm_epsilon=values["rms_norm_eps"],
        qk_layernorm=family.qk_norm,
        add_qkv_bias=values["qkv_bias"] if family.qkv_bias is None else family.qkv_bias,
        untie_embeddings_and_output_weights=not values["tie_word_embeddings"],
        init_method_std=values["initializer_range"],
    )
    return replace(base, decoder=decoder, moe=_import_experts(values, base.moe) if family.experts else None)


def _import_experts(values: Config, base: MoEConfig | None) -> MoEConfig:
    shape = dict(
        num_moe_experts=values["num_experts"],
        moe_layer_freq=values["decoder_sparse_step"],
        moe_ffn_hidden_size=values["moe_intermediate_size"],
        moe_router_topk=values["num_experts_per_tok"],
        moe_router_pre_softmax=not values["norm_topk_prob"],
        moe_router_score_function="softmax",
        moe_router_enable_expert_bias=False,
    )
    return MoEConfig(**shape) if base is None else replace(base, **shape)


LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""megatron-core has these as constants, at the values of all Llama 3 models."""


def _rope(values: Config) -> dict[str, Any]:
    """transformers 5's form of the rotary embedding's parameters; older files have two keys."""
    rope = {"rope_type": "default", "rope_theta": values["rope_theta"]}
    found = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in found.values()):
        found = {"rope_type": "per layer type"}
    rope |= {"rope_type": found["type"]} if "type" in found else {}
    rope |= found
    return {"partial_rotary_factor": values.get("partial_rotary_factor", 1.0), **rope}


def _unsupported_rope(rope: Config) -> Iterator[str]:
    kind = rope["rope_type"]
    if kind not in ("default", "llama3"):
        yield f"rotary scaling of type {kind}: supported are default and llama3"
    if kind == "llama3" and any(rope.get(key) != value for key, value in LLAMA3_ROPE.items()):
        wrong = ", ".join(f"{key} {rope.get(key)}" for key, value in LLAMA3_ROPE.items() if rope.get(key) != value)
        right = ", ".join(f"{key} {value:g}" for key, value in LLAMA3_ROPE.items())
        yield f"llama3 rotary scaling with {wrong}: supported is {right}"
    if rope["partial_rotary_factor"] not in (1.0, None):
        yield f"partial_rotary_factor {rope['partial_rotary_factor']}: only whole heads are rotated"


def _unsupported(family: DecoderFamily, values: Config) -> Iterator[str]:
    for key, neutral in _NEUTRAL.items():
        if key in values and values[key] not in neutral:
            yield f"{key} {_short(values[key])}: there is no counterpart, supported is {neutral[0]}"
    if family.experts and values["norm_topk_prob"] and values["num_experts_per_tok"] == 1:
        yield "norm_topk_prob with num_experts_per_tok 1: every weight is 1, and the router gets no gradient"
    kinds = set(values.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        yield f"layer_types {', '.join(sorted(kinds))}: supported is full_attention"


def _short_window(family: DecoderFamily, values: Config, positions: int) -> Iterator[str]:
    window = _sliding_window(family, values)
    if window is not None and window < positions:
        yield (
            f"sliding_window {window} is shorter than the sequences of {positions} positions, and attention here sees "
            f"all: train with data.seq_length {window} or less"
        )


def _sliding_window(family: DecoderFamily, values: Config) -> int | None:
    """Positions that some layer's attention sees at most; None: all."""
    if "sliding_window" not in family.defaults or not values.get("use_sliding_window", True):
        return None
    if values.get("layer_types"):
        return values["sliding_window"] if "sliding_attention" in values["layer_types"] else None
    if "max_window_layers" in family.defaults and values["max_window_layers"] >= values["num_hidden_layers"]:
        return None  # only layers after those have a window
    return values["sliding_window"] or None


def export_decoder_config(family: DecoderFamily, model: ModelConfig, *, seq_length: int, dtype: str) -> dict[str, Any]:
    """config.json of a decoder as a model of `family`.

    Raises:
        UserError: every reason why it cannot be one.
    """
    decoder, moe = model.decoder, model.moe
    if reasons := list(_inexpressible(family, model)):
        raise UserError("\n  ".join([f"this decoder cannot be a {family.model_type}:", *reasons]))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": decoder.rotary_base}
    if decoder.rope_scaling_factor is not None:
        rope |= {"rope_type": "llama3", "factor": decoder.rope_scaling_factor, **LLAMA3_ROPE}
    theirs: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": dtype,
        "torch_dtype": dtype,  # the same for transformers 4
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.ffn_hidden_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_attention_heads,
        "num_key_value_heads": num_query_groups(decoder),
        "head_dim": head_dim(decoder),
        "hidden_act": "silu",
        "initializer_range": decoder.init_method_std,
        "max_position_embeddings": seq_length,
        "rms_norm_eps": decoder.layernorm_epsilon,
        "rope_parameters": rope,
        "rope_theta": decoder.rotary_base,  # with rope_scaling, the same for transformers 4
        "tie_word_embeddings": not decoder.untie_embeddings_and_output_weights,
    }
    if decoder.rope_scaling_factor is not None:
        theirs["rope_scaling"] = rope
    theirs |= {key: False for key in ("attention_bias", "mlp_bias", "use_sliding_window") if key in family.defaults}
    if "sliding_window" in family.defaults:
        theirs["sliding_window"] = None
    if moe is not None:
        theirs |= {
            "num_experts": moe.num_moe_experts,
            "num_experts_per_tok": moe.moe_router_topk,
            "moe_intermediate_size": expert_ffn_size(model),
            "decoder_sparse_step": moe.moe_layer_freq,
            "mlp_only_layers": [],
            "norm_topk_prob": not moe.moe_router_pre_softmax,
            "router_aux_loss_coef": moe.moe_aux_loss_coeff,
        }
    if family.shared_expert:
        theirs["shared_expert_intermediate_size"] = 0
    if family.qkv_bias is None:
        theirs["qkv_bias"] = decoder.add_qkv_bias
    return theirs


def _inexpressible(family: DecoderFamily, model: ModelConfig) -> Iterator[str]:
    decoder, moe = model.decoder, model.moe
    if family.qkv_bias is not None and family.qkv_bias != decoder.add_qkv_bias:
        yield f"decoder.add_qkv_bias is {decoder.add_qkv_bias}, it takes {family.qkv_bias}"
    if family.qk_norm != decoder.qk_layernorm:
        yield f"decoder.qk_layernorm is {decoder.qk_layernorm}, it takes {family.qk_norm}"
    if family.experts != (moe is not None):
        yield "it has experts, and the model none" if family.experts else "it has no experts, and the model does"
    if family.model_type == "llama" and decoder.hidden_size % decoder.num_attention_heads:
        yield f"hidden_size {decoder.hidden_size} is no multiple of {decoder.num_attention_heads} heads, as it must be"
    if moe is not None:
        if moe.moe_router_score_function != "softmax":
            yield f"moe_router_score_function is {moe.moe_router_score_function}, it takes softmax"
        if moe.moe_router_enable_expert_bias:
            yield "moe_router_enable_expert_bias: it chooses experts without a bias"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
