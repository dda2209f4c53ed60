"""The Transformer Engine backend computes what the local one does, on a stand-in for Transformer Engine in float32.

What the stand-in can show is everything around the kernels: names and shapes of weights, arguments, boundaries of
packed sequences, communication. tests/gpu compares the real ones.
"""

import dataclasses
from typing import Any

import pytest

from megatron_mm1.config import Fp8Config, LoraConfig, MM1Config
from megatron_mm1.config.presets import preset
from megatron_mm1.config.schema import AttentionKernel, Fp8Recipe, LoraTarget
from megatron_mm1.data.records import Image, Text
from megatron_mm1.inference.requests import ScoringRequest
from tests import te_jobs
from tests.corpora import encoded, small_tokenizer
from tests.parallel import jobs
from tests.parallel.generation_jobs import lively, with_data

TOLERANCE = 2e-5
KINDS = ("mixed", "no image", "two resolutions", "padding")

TP_SP = dict(tensor_model_parallel_size=2, sequence_parallel=True)
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dense": ("mm1-tiny", 1, {}),
    "experts": ("mm1-tiny-moe", 1, {}),
    "dense, TP2": ("mm1-tiny", 2, dict(tensor_model_parallel_size=2)),
    "dense, TP2+SP, images shared": ("mm1-tiny", 2, dict(**TP_SP, vision_parallel_mode="data")),
    "dense, CP2": ("mm1-tiny", 2, dict(context_parallel_size=2)),
    "experts, TP2+SP": ("mm1-tiny-moe", 2, TP_SP),
    "experts, EP2": ("mm1-tiny-moe", 2, dict(expert_model_parallel_size=2)),
    "experts, CP2": ("mm1-tiny-moe", 2, dict(context_parallel_size=2)),
}


def config_of(name: str, *, fp8: Fp8Config | None = None, kernel: AttentionKernel = "torch", **sizes: Any) -> MM1Config:
    config = dataclasses.replace(preset(name), fp8=fp8 or Fp8Config())
    training = dataclasses.replace(
        config.training, global_batch_size=2, micro_batch_size=2, precision="fp32", attention_kernel=kernel
    )
    return jobs.with_parallel(dataclasses.replace(config, training=training), **sizes)


@pytest.mark.parametrize(
    ("layout", "kernel"),
    [(layout, "torch") for layout in LAYOUTS]
    + [(layout, "transformer_engine") for layout in ("dense", "dense, TP2+SP, images shared", "dense, CP2")],
)
def test_losses_and_every_gradient_are_the_local_backends(te_pool, layout, kernel: AttentionKernel):
    name, world_size, sizes = LAYOUTS[layout]
    for distances in te_pool(world_size).run(te_jobs.compare, config_of(name, kernel=kernel, **sizes), KINDS):
        apart = {name: distance for name, distance in distances.items() if not distance <= TOLERANCE}
        assert not apart


def test_adapters_and_the_norms_in_front_of_them_are_the_local_backends(te_pool):
    targets: tuple[LoraTarget, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    config = config_of("mm1-tiny", **TP_SP)
    lora = LoraConfig(rank=4, alpha=8.0, tower_targets=targets)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora))
    for distances in te_pool(2).run(te_jobs.compare, config, ("mixed",)):
        assert sum("lora_" in name for name in distances) > 0
        assert not {name: distance for name, distance in distances.items() if not distance <= TOLERANCE}


@pytest.mark.parametrize(
    ("layout", "recipe", "kernel"),
    [
        ("experts", "fp8_tensorwise", "torch"),
        ("experts", "fp8_tensorwise", "transformer_engine"),
        ("experts", "fp8_blockwise", "torch"),
        ("experts, TP2+SP", "fp8_tensorwise", "torch"),
        ("experts, TP2+SP", "fp8_blockwise", "transformer_engine"),
    ],
)
def test_rows_added_for_fp8_change_nothing(te_pool, layout, recipe: Fp8Recipe, kernel: AttentionKernel):
    """Images as one packed sequence, padded rows of experts and connectors. (Products are not quantised here.)"""
    name, world_size, sizes = LAYOUTS[layout]
    fp8 = Fp8Config(decoder_recipe=recipe, tower_recipe=recipe, connector_recipe=recipe)
    for distances in te_pool(world_size).run(te_jobs.compare, config_of(name, fp8=fp8, kernel=kernel, **sizes), KINDS):
        assert not {name: distance for name, distance in distances.items() if not distance <= TOLERANCE}


@pytest.mark.parametrize("fp8", [Fp8Config(), Fp8Config(decoder_recipe="fp8_blockwise", tower_recipe="fp8_blockwise")])
def test_the_engine_answers_as_with_the_local_backend(te_pool, tmp_path, fp8):
    """Rows in use need not be what FP8 wants a multiple of, nor what sequence parallelism splits."""
    tokenizer = small_tokenizer(tmp_path)
    config = lively(config_of("mm1-tiny-moe", fp8=fp8, **TP_SP), vocab_size=tokenizer.vocab_size)
    config = with_data(config, tokenizer=str(tokenizer.path))
    image = Image(encoded(seed=1))
    prompts = [(image, Text("a red")), (Text("the"),), (Text("a "), image, image)]
    requests = [ScoringRequest(prompt=prompt, continuation="blue circle") for prompt in prompts]
    for scores, expected_scores, texts, expected_texts in te_pool(2).run(te_jobs.score, config, requests):
        for score, expected in zip(scores, expected_scores, strict=True):
            assert score.token_log_likelihoods == pytest.approx(expected.token_log_likelihoods, rel=1e-4)
        assert texts == expected_texts and len(set(texts)) > 1


@pytest.mark.parametrize(("component", "world_size"), [("tower", 1), ("decoder", 1), ("decoder", 2)])
def test_attention_without_a_kernel_is_refused_with_the_reason(te_pool, component, world_size):
    """Transformer Engine itself goes on silently, with products of whole matrices."""
    config = config_of("mm1-tiny", kernel="transformer_engine", context_parallel_size=world_size)
    for said in te_pool(world_size).run(te_jobs.without_attention_kernels, config, component=component):
        assert said == (
            "training.attention_kernel transformer_engine: Transformer Engine has no attention kernel for this input: "
            "Disabling FusedAttention due to NVTE_FUSED_ATTN=0. Use training.attention_kernel torch, or see "
            "docs/install.md on cuDNN"
        )
