"""transformers' decoders become ours and ours theirs: the same logits, and the same tensors bit by bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mm1.checkpoint.families import export_model, import_model
from megatron_mm1.checkpoint.local_state import local_state_dict
from megatron_mm1.checkpoint.tensors import StateDict, collect
from megatron_mm1.config import DecoderConfig, MM1Config, ModelConfig, MoEConfig, OptimizerConfig, TrainingConfig
from megatron_mm1.config.validation import validate
from megatron_mm1.model.attention import segment_mask
from megatron_mm1.model.decoder import build_decoder, decoder_transformer_config
from tests import pretrained

TOLERANCE = 1e-4
POSITIONS = 40
BASE = ModelConfig(decoder=DecoderConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, one key per head": ("llama", dict(num_key_value_heads=6)),
    "llama, one key for all": ("llama", dict(num_key_value_heads=1)),
    "llama, tied": ("llama", dict(tie_word_embeddings=True)),
    "llama, head dim": ("llama", dict(head_dim=16)),
    "llama 3.2's rotation": ("llama", dict(rope_parameters=LLAMA3, max_position_embeddings=131072)),
    "llama, vocabulary of whole 128": ("llama", dict(vocab_size=256)),
    "mistral": ("mistral", {}),
    "mistral, sequence in its window": ("mistral", dict(sliding_window=64)),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", {}),
    "qwen3, tied": ("qwen3", dict(tie_word_embeddings=True)),
    **{
        f"{family}, every {step}, {'normalised' if norm else 'pre-softmax'}": (
            family,
            dict(decoder_sparse_step=step, norm_topk_prob=norm, num_hidden_layers=3),
        )
        for family in ("qwen2_moe", "qwen3_moe")
        for step in (1, 2)
        for norm in (True, False)
    },
    "qwen2_moe with qkv bias": ("qwen2_moe", dict(qkv_bias=True)),
    "qwen2_moe, head dim": ("qwen2_moe", dict(head_dim=12)),
    "qwen3_moe, one expert": ("qwen3_moe", dict(num_experts_per_tok=1, norm_topk_prob=False)),
}


def our_logits(model: ModelConfig, tensors: dict[str, Tensor], tokens: Tensor, groups: Any) -> Tensor:
    config = MM1Config(
        name="test",
        model=model,
        optimizer=OptimizerConfig(lr=1e-3),
        training=TrainingConfig(precision="fp32", global_batch_size=1),
    )
    validate(config, world_size=1)
    decoder = build_decoder(
        config,
        decoder_transformer_config(config, backend="local"),
        backend="local",
        pg_collection=groups,
        pre_process=True,
        post_process=True,
    ).eval()
    missing, unexpected = decoder.load_state_dict(local_state_dict(tensors, prefix="language_model."), strict=False)
    assert not unexpected
    assert not [name for name in missing if not name.endswith("_extra_state")]
    with torch.no_grad():
        logits = decoder(tokens, torch.arange(POSITIONS)[None], segment_mask(torch.ones(1, POSITIONS)))
    return logits[..., : model.decoder.vocab_size]


@pytest.mark.parametrize("case", CASES)
def test_a_decoder_gives_the_same_logits_here_and_comes_back_bit_by_bit(case, groups, tmp_path):
    family, settings = CASES[case]
    theirs = pretrained.decoder(family, **settings)
    config, source = pretrained.saved(theirs, tmp_path / "theirs")
    tokens = torch.randint(0, theirs.config.vocab_size, (1, POSITIONS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert expected.std() > 0.1  # a comparison of something

    model, plan = import_model(config, source, base=BASE)
    ours = collect(plan)
    assert {planned.name: planned.info.shape for planned in plan} == {name: t.shape for name, t in ours.items()}
    assert (our_logits(model, ours, tokens, groups) - expected).abs().max() <= TOLERANCE

    exported, plan = export_model(family, model, StateDict(ours), seq_length=theirs.config.max_position_embeddings)
    tensors = collect(plan)
    without_weight = [name for name in tensors if name.endswith("shared_expert_gate.weight")]  # of an empty expert
    assert not any(tensors[name].any() for name in without_weight)
    pretrained.assert_same_tensors(tensors, {**source.state, **{name: tensors[name] for name in without_weight}})
    again = pretrained.load_strictly(type(theirs), exported, tensors, tmp_path / "exported")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, expected)
    unlike = {"_name_or_path", "architectures", "transformers_version", "sliding_window", "router_aux_loss_coef"}
    before, after = theirs.config.to_dict(), again.config.to_dict()
    assert {key for key in before if before[key] != after.get(key)} <= unlike


def test_experts_are_read_one_at_a_time(tmp_path):
    config, source = pretrained.saved(pretrained.decoder("qwen3_moe"), tmp_path)
    _, plan = import_model(config, source, base=BASE)
    stacks = [planned for planned in plan if ".experts." in planned.name]
    assert len(stacks) == 4
    for planned in stacks:
        assert [piece.num_rows for piece in planned.pieces] == [1] * 5
        assert all(piece.read().shape == (1, *planned.info.shape[1:]) for piece in planned.pieces)


def test_training_settings_of_experts_stay_as_they_are(tmp_path):
    moe = MoEConfig(num_moe_experts=2, moe_layer_freq=1, moe_aux_loss_coeff=0.5, moe_expert_capacity_factor=1.5)
    config, source = pretrained.saved(pretrained.decoder("qwen2_moe"), tmp_path)
    model, _ = import_model(config, source, base=replace(BASE, moe=moe))
    assert model.moe == replace(
        moe, num_moe_experts=5, moe_ffn_hidden_size=24, moe_router_topk=2, moe_router_pre_softmax=False
    )
