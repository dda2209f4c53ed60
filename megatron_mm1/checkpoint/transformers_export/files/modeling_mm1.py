"""MM1: image tower -> connector -> decoder with image tokens among text tokens. Plain torch and transformers."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_mm1 import MM1Config, MM1TextConfig
from .vision_mm1 import CONNECTORS, MM1VisionTower

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this version of transformers calls the key/value cache."""


class MM1RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


def rotary_frequencies(config: MM1TextConfig, device: torch.device) -> Tensor:
    """[head_dim / 2] float32 radians per position; `llama3`: the slow ones of them stretched, as in Llama 3.1."""
    parameters = config.rope_parameters
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / parameters["rope_theta"] ** exponents
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return frequencies
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r} is not supported by this model")
    slowest, fastest = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - slowest) / (fastest - slowest)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / parameters["factor"])


def rotary_embedding(position_ids: Tensor, config: MM1TextConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, S, head_dim] of the rotary position embedding."""
    angles = position_ids[:, None, :, None].float() * rotary_frequencies(config, position_ids.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """[B, heads, S, head_dim] turned by the angles of `rotary_embedding`."""
    cosines, sines = rotary
    first, second = states.chunk(2, dim=-1)
    return states * cosines + torch.cat((-second, first), dim=-1) * sines


def causal_mask(attention_mask: Tensor | None, *, past: int, length: int, device: torch.device) -> Tensor:
    """Which of past + length positions the last `length` may attend to.

    Args:
        attention_mask: [B, past + length], 0 for padding; None: there is none.

    Returns:
        [B or 1, 1, length, past + length] bool. A position of padding sees itself, so that no row is empty.
    """
    keys = torch.arange(past + length, device=device)
    queries = keys[past:, None]
    mask = (keys <= queries)[None, None]
    if attention_mask is None:
        return mask
    return (mask & attention_mask[:, None, None, :].bool()) | (keys == queries)


class MM1Attention(nn.Module):
    """Causal attention, with fewer key/value heads than query heads where the configuration says so."""

    def __init__(self, config: MM1TextConfig, block: int) -> None:
        super().__init__()
        self.block = block
        self.head_dim = config.head_dim
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        hidden, bias = config.hidden_size, config.attention_bias
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=bias)
        self.k_proj = nn.Linear(hidden, keys, bias=bias)
        self.v_proj = nn.Linear(hidden, keys, bias=bias)
        self.o_proj = nn.Linear(queries, hidden, bias=False)
        if config.use_qk_norm:
            self.q_norm: nn.Module = MM1RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm: nn.Module = MM1RMSNorm(self.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(
        self, hidden_states: Tensor, *, rotary: tuple[Tensor, Tensor], mask: Tensor, cache: Cache | None
    ) -> Tensor:
        """[B, S, H] -> [B, S, H]; `mask`: [B or 1, 1, S, all positions] bool, True where attention is allowed."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = rotate(self.q_norm(query).transpose(1, 2), rotary)
        key, value = rotate(self.k_norm(key).transpose(1, 2), rotary), value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.block)
            # A static cache has room for positions yet to come.
            mask = functional.pad(mask, (0, key.shape[2] - mask.shape[3]))
        context = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=self.grouped)
        return self.o_proj(context.transpose(1, 2).flatten(2))


class MM1MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MM1Router(nn.Module):
    """Which experts each token goes to, and with what weights; computed in float32."""

    def __init__(self, config: MM1TextConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.scoring_func = config.scoring_func
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.e_score_correction_bias = None
        if config.use_expert_bias:
            bias = torch.zeros(config.num_experts, dtype=torch.float32)
            self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, H] -> weights (float32) and numbers of its experts, both [tokens, num_experts_per_tok]."""
        logits = functional.linear(hidden_states.float(), self.weight.float())
        scores = logits.sigmoid() if self.scoring_func == "sigmoid" else logits.softmax(dim=-1)
        preference = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias.float()
        experts = preference.topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, experts)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights, experts


class MM1Experts(nn.Module):
    """Experts in place of a feed-forward layer."""

    def __init__(self, config: MM1TextConfig) -> None:
        super().__init__()
        self.gate = MM1Router(config)
        self.experts = nn.ModuleList(
            MM1MLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.flatten(0, -2)
        weights, chosen = self.gate(tokens)
        weights = weights.to(tokens.dtype)
        result = torch.zeros_like(tokens)
        for number in chosen.unique().tolist():
            token, place = (chosen == number).nonzero(as_tuple=True)
            result.index_add_(0, token, self.experts[number](tokens[token]) * weights[token, place, None])
        return result.view_as(hidden_states)


class MM1DecoderLayer(nn.Module):
    """A pre-norm block."""

    def __init__(self, config: MM1TextConfig, block: int) -> None:
        super().__init__()
        self.input_layernorm = MM1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MM1Attention(config, block)
        self.post_attention_layernorm = MM1RMSNorm(config.hidden_size, config.rms_norm_eps)
        experts = config.has_experts(block)
        self.mlp = MM1Experts(config) if experts else MM1MLP(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor, **attention: Any) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **attention)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MM1PreTrainedModel(PreTrainedModel):
    config_class = MM1Config
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    _no_split_modules = ["MM1DecoderLayer", "MM1VisionLayer"]  # noqa: RUF012  # as transformers declares it
    _supports_sdpa = True
    _can_compile_fullgraph = False
    _keep_in_fp32_modules_strict = {"e_score_correction_bias"}  # noqa: RUF012

    def __init__(self, config: MM1Config) -> None:
        super().__init__(config)
        if config._attn_implementation not in ("sdpa", None):
            raise ValueError(f"attn_implementation={config._attn_implementation!r}: this model has 'sdpa' only")


class MM1TextModel(nn.Module):
    """The decoder, from embeddings to normalised hidden states."""

    def __init__(self, config: MM1TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MM1DecoderLayer(config, block) for block in range(config.num_hidden_layers))
        self.norm = MM1RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        inputs_embeds: Tensor,
        *,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the last hidden states [B, S, H], and those that went into each block and the last norm's output.

        Args:
            attention_mask: [B, past + S], 0 for padding; or [B, 1, S, keys] bool as `causal_mask` makes it.
            position_ids: [B, S]; None: counted over what is not padding.
            cache: of earlier positions; these are added to it.
        """
        length = inputs_embeds.shape[1]
        past = int(cache.get_seq_length()) if cache is not None else 0
        if position_ids is None:
            counted = attention_mask
            if counted is None or counted.dim() != 2:
                counted = torch.ones(1, past + length, dtype=torch.int64, device=inputs_embeds.device)
            position_ids = (counted.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
        mask = attention_mask
        if mask is None or mask.dim() == 2:
            mask = causal_mask(mask, past=past, length=length, device=inputs_embeds.device)
        rotary = rotary_embedding(position_ids, self.config, inputs_embeds.dtype)
        hidden_states, seen = inputs_embeds, []
        for layer in self.layers:
            seen.append(hidden_states)
            hidden_states = layer(hidden_states, rotary=rotary, mask=mask, cache=cache)
        hidden_states = self.norm(hidden_states)
        return hidden_states, [*seen, hidden_states]


class MM1Model(MM1PreTrainedModel):
    """Tower, connector and decoder without its output layer."""

    def __init__(self, config: MM1Config) -> None:
        super().__init__(config)
        vision, connector = config.vision_config, config.connector_config
        self.vision_tower = MM1VisionTower(vision)
        self.connector = CONNECTORS[connector.connector](
            connector,
            vision_hidden_size=vision.hidden_size,
            hidden_size=config.text_config.hidden_size,
            grid=self.vision_tower.grid(vision.image_size, vision.image_size),
        )
        self.language_model = MM1TextModel(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.embed_tokens = value

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W], normalised -> [N, tokens_per_image, hidden_size]."""
        grid = self.vision_tower.grid(*pixel_values.shape[-2:])
        return self.connector(self.vision_tower(pixel_values), grid)

    def _embed(self, input_ids: Tensor | None, pixel_values: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """[B, S, H] with image tokens in their places, or `inputs_embeds` as they are."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is not None:
            if pixel_values is not None:
                raise ValueError("pixel_values need input_ids, which say where image tokens go")
            return inputs_embeds
        assert input_ids is not None
        embeddings = self.get_input_embeddings()(input_ids)
        slots = input_ids == self.config.image_token_id
        per_image = self.config.connector_config.tokens_per_image
        images = 0 if pixel_values is None else pixel_values.shape[0]
        if int(slots.sum()) != images * per_image:
            raise ValueError(
                f"{int(slots.sum())} image positions in input_ids, but {images} images make {images * per_image}"
            )
        if pixel_values is None or not images:
            return embeddings
        return embeddings.masked_scatter(slots[..., None], self.get_image_features(pixel_values).to(embeddings))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states of a batch.

        Args:
            input_ids: [B, S]; an image takes tokens_per_image positions of `config.image_token_id`.
            pixel_values: [images of the batch, 3, H, W], in reading order.
            attention_mask: [B, positions in cache + S], 0 for padding, on either side.
            cache: keys and values of earlier positions, called `past_key_values` by older versions of transformers.
        """
        if output_attentions:
            raise ValueError("output_attentions: this model does not keep attention weights")
        cache = cache if cache is not None else past_key_values
        use_cache = self.config.text_config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None and not self.training:
            cache = DynamicCache(config=self.config)
        embeddings = self._embed(input_ids, pixel_values, inputs_embeds)
        hidden_states, seen = self.language_model(
            embeddings, attention_mask=attention_mask, position_ids=position_ids, cache=cache
        )
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=tuple(seen) if output_hidden_states else None,
            **{CACHE: cache if use_cache else None},
        )
        return output.to_tuple() if return_dict is False else output


class MM1ForConditionalGeneration(MM1PreTrainedModel, GenerationMixin):
    """MM1 with its output layer: text from text and images."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MM1Config) -> None:
        super().__init__(config)
        self.model = MM1Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W], normalised -> [N, tokens_per_image, hidden_size]."""
        return self.model.get_image_features(pixel_values)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, S, vocabulary], or of the last `logits_to_keep` positions, and with `labels` (-100: not trained)
        the mean loss of predicting each from the position before. See `MM1Model.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache if cache is not None else past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=kwargs.pop("output_attentions", None),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: outputs.get(CACHE)}
        )
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """As transformers prepares them; once its images are in the cache, a sequence goes on without pixels."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        ids = inputs.get("input_ids")
        if ids is not None and not (ids == self.config.image_token_id).any():
            inputs["pixel_values"] = None
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat each sequence, and with it all of its images, for several samples or beams."""
        pixel_values = kwargs.pop("pixel_values", None)
        if pixel_values is not None and input_ids is not None and expand_size > 1:
            positions = (input_ids == self.config.image_token_id).sum(dim=1)
            images = (positions // self.config.connector_config.tokens_per_image).tolist()
            pixel_values = torch.cat([part.repeat(expand_size, 1, 1, 1) for part in pixel_values.split(images)])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if pixel_values is not None:
            kwargs["pixel_values"] = pixel_values
        return input_ids, kwargs


__all__ = ["MM1ForConditionalGeneration", "MM1Model", "MM1PreTrainedModel"]
