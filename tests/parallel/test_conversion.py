"""Weights of other libraries go through any layout and come back bit by bit, and compute the same in it."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mm1.checkpoint.decoder_configs import DECODERS
from megatron_mm1.checkpoint.families import export_model, import_model
from megatron_mm1.checkpoint.format import CheckpointMetadata
from megatron_mm1.checkpoint.mm1_folder import MM1Checkpoint, write_mm1
from megatron_mm1.checkpoint.tensors import collect
from megatron_mm1.config import (
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    MM1Config,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    VisionConfig,
)
from megatron_mm1.config.serialization import to_dict
from tests import pretrained
from tests.llava import VOCABULARY, llava_logits, llava_model, packed, sample
from tests.parallel import conversion_jobs as jobs

BASE = ModelConfig(
    decoder=DecoderConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1),
    vision=VisionConfig(
        image_size=16, patch_size=8, num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2
    ),
    connector=ConnectorConfig(connector="average_pool", tokens_per_image=1),
)
TP2 = dict(tensor_model_parallel_size=2)
TP2_SP = dict(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)
DISTRIBUTED = dict(use_distributed_optimizer=True)
EP2 = dict(expert_model_parallel_size=2)


def write(folder: Path, theirs: dict[str, Any], source: Any) -> ModelConfig:
    """Their weights as a checkpoint of ours, as `mm1 convert import` makes it."""
    model, plan = import_model(theirs, source, base=BASE)
    config = MM1Config(
        name="converted",
        model=model,
        optimizer=OptimizerConfig(lr=1e-3),
        data=DataConfig(seq_length=64, max_images_per_sequence=4),
        training=TrainingConfig(precision="fp32", global_batch_size=8),
    )
    metadata = CheckpointMetadata(
        iteration=0,
        consumed_sequences=0,
        config=to_dict(config),
        tokenizer_fingerprint="",
        plan_fingerprint="",
        components=("decoder",) if theirs["model_type"] != "llava" else ("tower", "connector", "decoder"),
        has_training_state=False,
    )
    write_mm1(folder, plan, metadata)
    return model


@st.composite
def decoders_and_layouts(draw: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A family, a small configuration of it, and a layout of two processes that can hold it."""
    family = draw(st.sampled_from(list(DECODERS)))
    experts = DECODERS[family].experts
    layout = draw(
        st.sampled_from(
            [TP2_SP, PP2, DISTRIBUTED, EP2, {**EP2, **DISTRIBUTED}] if experts else [TP2, TP2_SP, PP2, DISTRIBUTED, {}]
        )
    )
    groups, heads_per_group = draw(st.sampled_from([2, 4])), draw(st.integers(1, 2))
    heads, layers = groups * heads_per_group, draw(st.sampled_from([2, 4]))
    values = dict(
        vocab_size=draw(st.integers(130, 400)),
        hidden_size=heads * 8,
        intermediate_size=4 * draw(st.integers(2, 12)),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=8,
        tie_word_embeddings=draw(st.booleans()),
    )
    if experts:
        count = draw(st.sampled_from([2, 4]))
        values |= dict(
            num_experts=count,
            moe_intermediate_size=4 * draw(st.integers(1, 6)),
            norm_topk_prob=draw(st.booleans()),
            decoder_sparse_step=draw(st.integers(1, 2)),
        )
    return family, values, layout


def there_and_back(pool: Any, case: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    family, values, layout = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs, source = pretrained.saved(pretrained.decoder(family, **values), folder / "theirs")
        model = write(folder / "ours", theirs, source)
        path = pool(2).run(jobs.save_from_layout, folder / "ours", layout, folder / "from layout")[0]
        exported, plan = export_model(family, model, MM1Checkpoint(path), seq_length=64)
        tensors = collect(plan)
        lost = {name for name in source.state if "shared_expert_gate" in name}  # of an expert without width
        pretrained.assert_same_tensors(
            {name: tensor for name, tensor in tensors.items() if name not in lost},
            {name: tensor for name, tensor in source.state.items() if name not in lost},
        )
        assert import_model(exported, source, base=BASE)[0] == model


@given(case=decoders_and_layouts())
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_weights_come_back_from_a_layout_bit_by_bit(pool, case):
    there_and_back(pool, case)


@pytest.mark.slow
@given(case=decoders_and_layouts())
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_weights_come_back_from_many_layouts_bit_by_bit(pool, case):
    there_and_back(pool, case)


LAYOUTS = {
    "one process": (1, {}),
    "TP2": (2, TP2_SP),
    "PP2": (2, PP2),
    "EP2": (2, EP2),
}


FAMILIES = [*DECODERS, "qwen3_moe, every 2"]


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, layout) for family in FAMILIES for layout in LAYOUTS if layout != "EP2" or "moe" in family],
)
def test_a_decoder_computes_the_same_in_a_layout(pool, tmp_path, family, layout):
    world_size, sizes = LAYOUTS[layout]
    name, _, every = family.partition(", ")
    options = dict(num_experts=4, decoder_sparse_step=2 if every else 1) if "moe" in family else {}
    theirs = pretrained.decoder(name, **options)
    write(tmp_path / "ours", *pretrained.saved(theirs, tmp_path / "theirs"))
    tokens, pixels = sample(0, length=24)
    batch = packed([(tokens, pixels)], seq_length=24)
    with torch.no_grad():
        expected = theirs(tokens[None]).logits
    found = [rank for rank in pool(world_size).run(jobs.logits, tmp_path / "ours", sizes, [batch]) if rank]
    assert found and expected.std() > 0.1
    for [logits] in found:
        assert (logits[..., : theirs.config.vocab_size] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("layout", ["one process", "TP2", "PP2"])
def test_a_llava_computes_the_same_in_a_layout(pool, tmp_path, layout):
    world_size, sizes = LAYOUTS[layout]
    theirs = llava_model(vocab_size=VOCABULARY).eval()
    write(tmp_path / "ours", *pretrained.saved(theirs, tmp_path / "theirs"))
    samples = [sample(images) for images in (0, 1, 3)]
    batches = [packed([pair], seq_length=len(pair[0])) for pair in samples]
    found = [rank for rank in pool(world_size).run(jobs.logits, tmp_path / "ours", sizes, batches) if rank]
    assert found
    for logits in found:
        for ours, (tokens, pixels) in zip(logits, samples, strict=True):
            expected = llava_logits(theirs, tokens, pixels)
            assert (ours[0, :, :VOCABULARY] - expected).abs().max() <= 1e-4


def test_parts_that_a_checkpoint_lacks_stay_as_they_were_drawn(pool, tmp_path):
    write(tmp_path / "ours", *pretrained.saved(pretrained.decoder("llama"), tmp_path / "theirs"))
    assert pool(1).run(jobs.start_from_part, tmp_path / "ours") == [(("tower", "connector"), {"decoder"})]
