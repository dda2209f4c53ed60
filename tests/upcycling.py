"""A small dense MM1, and jobs of worker processes on what becomes of it."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_mm1.checkpoint.tensors import StateDict, collect
from megatron_mm1.checkpoint.upcycle import upcycle
from megatron_mm1.config import (
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    MM1Config,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
    VisionConfig,
)
from megatron_mm1.data.batch import IGNORE, PackedBatch
from megatron_mm1.model.mm1 import MM1Model
from megatron_mm1.parallel.groups import build_process_groups, destroy_process_groups
from megatron_mm1.parity.batches import synthetic_batches
from tests.canonical import canonical_state, load_canonical, randomize

DENSE = MM1Config(
    name="dense",
    model=ModelConfig(
        vision=VisionConfig(
            image_size=16, patch_size=8, num_layers=1, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2
        ),
        connector=ConnectorConfig(connector="mlp", tokens_per_image=4),
        decoder=DecoderConfig(
            num_layers=2,
            hidden_size=32,
            ffn_hidden_size=48,
            num_attention_heads=4,
            num_query_groups=2,
            vocab_size=256,
        ),
    ),
    data=DataConfig(seq_length=64, max_images_per_sequence=3),
    optimizer=OptimizerConfig(lr=1e-3),
    training=TrainingConfig(precision="fp32", micro_batch_size=2, global_batch_size=2),
)


SMALL: dict[str, Any] = dict(num_moe_experts=4, moe_layer_freq=2)
CASES: dict[str, dict[str, Any]] = {
    "every block": dict(moe_layer_freq=1),
    "every second": dict(moe_layer_freq=2),
    "top 3": dict(moe_router_topk=3),
    "sigmoid": dict(moe_router_score_function="sigmoid"),
    "expert bias": dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
    "halves": dict(moe_ffn_hidden_size=24, num_moe_experts=6),
    "thirds, top 6": dict(moe_ffn_hidden_size=16, num_moe_experts=9, moe_router_topk=6, moe_layer_freq=1),
    "sigmoid, halves": dict(moe_ffn_hidden_size=24, moe_router_score_function="sigmoid"),
}
"""Experts that keep the first loss, beside what SMALL says."""


def with_model(model: ModelConfig, *, expert_model_parallel_size: int = 1) -> MM1Config:
    return replace(DENSE, model=model, parallel=ParallelConfig(expert_model_parallel_size=expert_model_parallel_size))


def dense_model(config: MM1Config, groups) -> tuple[MM1Model, dict[str, Tensor]]:
    """A model of which every tensor is random and distinct, and those tensors."""
    model = MM1Model(config, backend="local", pg_collection=groups)
    randomize(model)
    return model, canonical_state(model, groups)


def upcycled(state: dict[str, Tensor], moe: dict, *, config: MM1Config = DENSE, seed: int = 7):
    """(configuration, tensors) of the dense model with these experts."""
    model, plan = upcycle(config.model, MoEConfig(**{**SMALL, **moe}), StateDict(state), seed=seed)
    return with_model(model), collect(plan)


def batch() -> PackedBatch:
    """Examples with and without images, and padding."""
    [packed] = synthetic_batches(DENSE, "mixed")
    assert packed.images
    return packed


def losses(model: MM1Model) -> Tensor:
    """Of the trained positions, in training mode as in a first step."""
    packed = batch()
    trained = packed.labels.flatten() != IGNORE
    return model.train()(packed)[trained].detach()


def losses_in_layout(config: MM1Config, state: dict[str, Tensor]) -> Tensor:
    """On each rank of a layout: the losses of a model that has been given these tensors."""
    groups = build_process_groups(config.parallel, seed=1)
    model = MM1Model(config, backend="local", pg_collection=groups)
    load_canonical(model, state, groups)
    found = losses(model)
    destroy_process_groups()
    return found
