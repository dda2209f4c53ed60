"""Pretrained decoders under our names: transformers' Llama."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_mm1.config.derived import head_dim, num_query_groups, padded_vocab_size
from megatron_mm1.config.schema import DecoderConfig
from megatron_mm1.errors import UserError

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


def group_qkv(query: Tensor, key: Tensor, value: Tensor, *, num_query_groups: int) -> Tensor:
    """Three projections -> megatron-core's one: for each query group its queries, its key, its value.

    Args:
        query: [heads * head_dim, ...].
        key, value: [num_query_groups * head_dim, ...].
    """
    parts = [part.unflatten(0, (num_query_groups, -1)) for part in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def import_llama_state(
    source: Mapping[str, Tensor], *, config: DecoderConfig, model_prefix: str = "model.", output: str = "lm_head.weight"
) -> dict[str, Tensor]:
    """The state dict of our decoder (`MM1Model.language_model`, local backend, one process) from transformers' Llama.

    Args:
        source: their tensors by their names.
        config: of the decoder; block i of theirs becomes our layers 2i (attention) and 2i + 1 (feed-forward).
        model_prefix: what precedes the names of embeddings, layers and last norm in `source`.
        output: name of the output layer's weight in `source`; not read where the output is tied to the embeddings.

    Raises:
        UserError: a tensor is missing or has another shape than `config` says.
    """
    hidden, dim, ffn = config.hidden_size, head_dim(config), config.ffn_hidden_size
    queries, key_values = config.num_attention_heads * dim, num_query_groups(config) * dim

    def take(name: str, *shape: int) -> Tensor:
        if name not in source:
            raise UserError(f"these weights are no Llama of {config.num_layers} blocks: {name} is missing")
        if tuple(source[name].shape) != shape:
            raise UserError(f"{name} has shape {tuple(source[name].shape)}, model.decoder makes it {shape}")
        return source[name]

    def padded(name: str) -> Tensor:
        weight = take(name, config.vocab_size, hidden)
        return torch.nn.functional.pad(weight, (0, 0, 0, padded_vocab_size(config.vocab_size) - config.vocab_size))

    state = {
        EMBEDDING: padded(f"{model_prefix}embed_tokens.weight"),
        "decoder.final_norm.weight": take(f"{model_prefix}norm.weight", hidden),
    }
    if config.untie_embeddings_and_output_weights:
        state[OUTPUT] = padded(output)
    for block in range(config.num_layers):
        theirs, attention, mlp = (
            f"{model_prefix}layers.{block}.",
            f"decoder.layers.{2 * block}.",
            f"decoder.layers.{2 * block + 1}.",
        )
        state[f"{attention}input_layernorm.weight"] = take(f"{theirs}input_layernorm.weight", hidden)
        state[f"{attention}self_attention.linear_qkv.weight"] = group_qkv(
            take(f"{theirs}self_attn.q_proj.weight", queries, hidden),
            take(f"{theirs}self_attn.k_proj.weight", key_values, hidden),
            take(f"{theirs}self_attn.v_proj.weight", key_values, hidden),
            num_query_groups=num_query_groups(config),
        )
        state[f"{attention}self_attention.linear_proj.weight"] = take(
            f"{theirs}self_attn.o_proj.weight", hidden, queries
        )
        state[f"{mlp}pre_mlp_layernorm.weight"] = take(f"{theirs}post_attention_layernorm.weight", hidden)
        state[f"{mlp}mlp.linear_fc1.weight"] = torch.cat(
            [take(f"{theirs}mlp.gate_proj.weight", ffn, hidden), take(f"{theirs}mlp.up_proj.weight", ffn, hidden)]
        )
        state[f"{mlp}mlp.linear_fc2.weight"] = take(f"{theirs}mlp.down_proj.weight", hidden, ffn)
    return state
