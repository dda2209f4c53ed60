"""The decoder on HybridModel equals megatron-core's GPTModel on the same weights: dense, with experts, with each
attention option.
"""

import dataclasses
import re

import pytest
import torch

from megatron_mm1.config import DecoderConfig, MM1Config, ModelConfig, MoEConfig, OptimizerConfig, TrainingConfig
from megatron_mm1.model.attention import segment_mask
from megatron_mm1.model.decoder import build_decoder, decoder_transformer_config

BASE = dict(num_layers=4, hidden_size=48, ffn_hidden_size=96, num_attention_heads=6, vocab_size=256)
CASES = {
    "dense": ({}, None),
    "GQA": (dict(num_query_groups=2), None),
    "qkv bias": (dict(add_qkv_bias=True), None),
    "QK-norm": (dict(qk_layernorm=True), None),
    "tied": (dict(untie_embeddings_and_output_weights=False), None),
    "head dim": (dict(kv_channels=16), None),
    "rotary base": (dict(rotary_base=500.0), None),
    "MoE": ({}, MoEConfig(num_moe_experts=4, moe_layer_freq=2)),
    "MoE every block": ({}, MoEConfig(num_moe_experts=4, moe_layer_freq=1, moe_ffn_hidden_size=32)),
}


def build_pair(case: str, groups):
    """(our decoder, GPTModel with the same weights); every tensor random and distinct."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    options, moe = CASES[case]
    decoder = DecoderConfig(**{**BASE, **options})
    config = MM1Config(
        name="test",
        model=ModelConfig(decoder=decoder, moe=moe),
        optimizer=OptimizerConfig(lr=1e-3),
        training=TrainingConfig(precision="fp32"),
    )
    ours_config = decoder_transformer_config(config, backend="local")
    ours = build_decoder(
        config, ours_config, backend="local", pg_collection=groups, pre_process=True, post_process=True
    ).eval()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(ours.named_parameters()):
            parameter.normal_(std=0.15, generator=torch.Generator().manual_seed(number))
            if "norm" in name:
                parameter.add_(1.0)

    frequency = [int(moe is not None and (block + 1) % moe.moe_layer_freq == 0) for block in range(decoder.num_layers)]
    theirs_config = dataclasses.replace(
        ours_config,
        num_layers=decoder.num_layers,
        is_hybrid_model=False,
        moe_layer_freq=frequency if moe else 1,
        moe_expert_capacity_factor=None,
        use_te_activation_func=False,  # megatron-core's own activation and rotation
        apply_rope_fusion=False,
    )
    theirs = GPTModel(
        theirs_config,
        get_gpt_decoder_block_spec(
            theirs_config, use_transformer_engine=False, normalization="RMSNorm", qk_l2_norm=False
        ),
        vocab_size=256,
        max_sequence_length=64,
        share_embeddings_and_output_weights=not decoder.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=decoder.rotary_base,
        pg_collection=groups,
    ).eval()
    state = {as_gpt_name(name): parameter for name, parameter in ours.named_parameters()}
    assert set(state) == {name for name, _ in theirs.named_parameters()}
    theirs.load_state_dict(state, strict=False)
    return ours, theirs


def as_gpt_name(name: str) -> str:
    """Layer 2i or 2i + 1 of the pattern is block i."""
    name = name.replace("decoder.final_norm", "decoder.final_layernorm")
    return re.sub(r"layers\.(\d+)\.", lambda match: f"layers.{int(match[1]) // 2}.", name)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_gpt_model(groups, case):
    ours, theirs = build_pair(case, groups)
    tokens = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40)[None]
    ours_logits = ours(tokens, positions, segment_mask(torch.ones(1, 40)))
    theirs_logits = theirs(tokens, positions, torch.ones(1, 1, 40, 40).triu(1).bool())
    torch.testing.assert_close(ours_logits, theirs_logits, atol=2e-5, rtol=1e-5)

    (ours_logits.log_softmax(-1) ** 2).mean().backward()
    (theirs_logits.log_softmax(-1) ** 2).mean().backward()
    theirs_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs_gradients[as_gpt_name(name)], atol=1e-5, rtol=1e-4)
