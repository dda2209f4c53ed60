"""transformers' decoders and ours: which tensors correspond.

Their block i is our layers 2i (attention) and 2i + 1 (feed-forward or experts).
"""

import torch

from megatron_mm1.checkpoint.rules import (
    Correspondence,
    Filler,
    Rule,
    concatenated,
    for_layers,
    grouped,
    padded,
    same,
)
from megatron_mm1.config.derived import (
    expert_ffn_size,
    head_dim,
    is_moe_block,
    num_query_groups,
    padded_vocab_size,
)
from megatron_mm1.config.schema import ModelConfig

OURS = "language_model."
_ATTENTION = f"{OURS}decoder.layers.{{attention}}."
_FFN = f"{OURS}decoder.layers.{{ffn}}."
_THEIRS = "model.layers.{block}."


def decoder_correspondence(model: ModelConfig, *, shared_expert_gate: bool = False) -> Correspondence:
    """The tensors of a decoder; names of theirs as in a file of transformers' (`model.`.., `lm_head.`..).

    Args:
        shared_expert_gate: theirs has a shared expert beside the others, here one without width, and its gate.
    """
    decoder = model.decoder
    blocks = [{"block": block, "attention": 2 * block, "ffn": 2 * block + 1} for block in range(decoder.num_layers)]
    sparse = [numbers for numbers in blocks if is_moe_block(model, numbers["block"])]
    dense = [numbers for numbers in blocks if numbers not in sparse]
    rules = (
        *_ends(model),
        *for_layers(_attention(model), blocks),
        *for_layers(_dense(model), dense),
        *(for_layers(_experts(model), sparse) if sparse else ()),
    )
    fillers = [
        filler
        for numbers in (sparse if shared_expert_gate else ())
        for filler in _shared_expert(_THEIRS.format_map(numbers), decoder.hidden_size)
    ]
    unread = tuple(f"model.layers.{numbers['block']}.self_attn.rotary_emb.inv_freq" for numbers in blocks)
    if not decoder.untie_embeddings_and_output_weights:
        unread += ("lm_head.weight",)  # some files repeat the embeddings under this name
    return Correspondence(rules, tuple(fillers), unread, (OURS,))


def _ends(model: ModelConfig) -> list[Rule]:
    decoder = model.decoder
    table = (padded_vocab_size(decoder.vocab_size), decoder.hidden_size)
    embedding, output = f"{OURS}embedding.word_embeddings.weight", f"{OURS}output_layer.weight"
    rules = [
        padded(embedding, "model.embed_tokens.weight", table, rows=decoder.vocab_size),
        same(f"{OURS}decoder.final_norm.weight", "model.norm.weight", (decoder.hidden_size,)),
    ]
    if decoder.untie_embeddings_and_output_weights:
        rules.append(padded(output, "lm_head.weight", table, rows=decoder.vocab_size))
    return rules


def _attention(model: ModelConfig) -> list[Rule]:
    decoder = model.decoder
    hidden, dim, groups = decoder.hidden_size, head_dim(decoder), num_query_groups(decoder)
    queries = decoder.num_attention_heads * dim
    fused = queries + 2 * groups * dim
    counts = (queries // groups, dim, dim)
    projections = [f"{_THEIRS}self_attn.{name}_proj" for name in "qkv"]
    qkv = f"{_ATTENTION}self_attention.linear_qkv"
    rules = [
        same(f"{qkv}.layer_norm_weight", f"{_THEIRS}input_layernorm.weight", (hidden,)),
        grouped(
            f"{qkv}.weight", [f"{name}.weight" for name in projections], (fused, hidden), groups=groups, counts=counts
        ),
        same(f"{_ATTENTION}self_attention.linear_proj.weight", f"{_THEIRS}self_attn.o_proj.weight", (hidden, queries)),
    ]
    if decoder.add_qkv_bias:
        biases = [f"{name}.bias" for name in projections]
        rules.append(grouped(f"{qkv}.bias", biases, (fused,), groups=groups, counts=counts))
    if decoder.qk_layernorm:
        rules += [
            same(
                f"{_ATTENTION}self_attention.{name}_layernorm.weight", f"{_THEIRS}self_attn.{name}_norm.weight", (dim,)
            )
            for name in "qk"
        ]
    return rules


def _dense(model: ModelConfig) -> list[Rule]:
    hidden, ffn = model.decoder.hidden_size, model.decoder.ffn_hidden_size
    gate_up = [f"{_THEIRS}mlp.gate_proj.weight", f"{_THEIRS}mlp.up_proj.weight"]
    return [
        same(f"{_FFN}mlp.linear_fc1.layer_norm_weight", f"{_THEIRS}post_attention_layernorm.weight", (hidden,)),
        concatenated(f"{_FFN}mlp.linear_fc1.weight", gate_up, (2 * ffn, hidden)),
        same(f"{_FFN}mlp.linear_fc2.weight", f"{_THEIRS}mlp.down_proj.weight", (hidden, ffn)),
    ]


def _experts(model: ModelConfig) -> list[Rule]:
    assert model.moe is not None
    hidden, ffn, experts = model.decoder.hidden_size, expert_ffn_size(model), model.moe.num_moe_experts
    stack, expert = f"{_FFN}mlp.experts.experts", f"{_THEIRS}mlp.experts.{{expert}}"
    gate_up = [f"{expert}.gate_proj.weight", f"{expert}.up_proj.weight"]
    return [
        same(f"{_FFN}pre_mlp_layernorm.weight", f"{_THEIRS}post_attention_layernorm.weight", (hidden,)),
        same(f"{_FFN}mlp.router.weight", f"{_THEIRS}mlp.gate.weight", (experts, hidden)),
        concatenated(f"{stack}.linear_fc1.weight", gate_up, (2 * ffn, hidden), num_experts=experts),
        concatenated(f"{stack}.linear_fc2.weight", [f"{expert}.down_proj.weight"], (hidden, ffn), num_experts=experts),
    ]


def _shared_expert(block: str, hidden: int) -> list[Filler]:
    expert = f"{block}mlp.shared_expert"
    return [
        Filler(f"{expert}.gate_proj.weight", (0, hidden), torch.empty),
        Filler(f"{expert}.up_proj.weight", (0, hidden), torch.empty),
        Filler(f"{expert}.down_proj.weight", (hidden, 0), torch.empty),
        Filler(f"{expert}_gate.weight", (1, hidden)),
    ]
