"""Small models with the awkward sizes of large ones, in every backend and precision, with the same weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_mm1.config import MM1Config
from megatron_mm1.config.schema import (
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    Fp8Config,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainingConfig,
    VisionConfig,
)
from megatron_mm1.model.mm1 import MM1Model
from megatron_mm1.training.build import build_model, build_module, unwrap
from tests.canonical import canonical_state, load_canonical

Precision = Literal["bf16", "fp32", "fp64"]

FP8_RECIPES = ("fp8_delayed", "fp8_tensorwise", "fp8_blockwise")

TOWER = VisionConfig(
    image_size=64, patch_size=8, num_layers=2, hidden_size=128, ffn_hidden_size=512, num_attention_heads=2
)
"""64 patches and a class token: 65 positions, which no GEMM's tile divides."""

VIT_H_LIKE = VisionConfig(num_layers=2, hidden_size=320, ffn_hidden_size=1280, num_attention_heads=4)
"""ViT-H's 378 px images, 730 positions and head dim of 80, on a quarter of its width."""

ALL_EXPERTS = MoEConfig(
    num_moe_experts=4,
    moe_layer_freq=2,
    moe_ffn_hidden_size=256,
    moe_router_topk=4,
    moe_aux_loss_coeff=0.0,
    moe_z_loss_coeff=0.0,
)
"""Every token goes to every expert: rounding changes no choice, and so outputs can be compared."""


def small_config(
    *, vision: VisionConfig = TOWER, moe: MoEConfig | None = None, fp8: Fp8Config | None = None, **decoder: Any
) -> MM1Config:
    """Two decoder blocks 256 wide over 4 sequences of 256 positions; `decoder` overrides its fields."""
    shape = dict(num_layers=2, hidden_size=256, ffn_hidden_size=512, num_attention_heads=4, vocab_size=512)
    return MM1Config(
        name="gpu-test",
        model=ModelConfig(
            decoder=DecoderConfig(**(shape | decoder)),
            vision=vision,
            connector=ConnectorConfig(tokens_per_image=16, hidden_size=128, num_layers=1, num_attention_heads=4),
            moe=moe,
        ),
        optimizer=OptimizerConfig(lr=1e-3, lr_warmup_iters=10),
        data=DataConfig(seq_length=256, max_images_per_sequence=6),
        training=TrainingConfig(micro_batch_size=4, global_batch_size=4, train_iters=400),
        fp8=fp8 or Fp8Config(),
    )


def all_fp8(recipe: str, config: MM1Config, **fields: Any) -> MM1Config:
    """`config` with one recipe for every component that has FP8 layers."""
    fp8 = Fp8Config(decoder_recipe=recipe, tower_recipe=recipe, connector_recipe=recipe, **fields)  # type: ignore[arg-type]
    return dataclasses.replace(config, fp8=fp8)


def with_precision(config: MM1Config, precision: str) -> MM1Config:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, precision=precision))


def random_weights(config: MM1Config, groups: ProcessGroupCollection, *, seed: int = 0) -> dict[str, Tensor]:
    """A whole model's weights by their names in checkpoints, on the host: distinct, and numbers that bf16 has."""
    plain = dataclasses.replace(config, fp8=Fp8Config())
    model = build_module(with_precision(plain, "fp32"), backend="local", pg_collection=groups)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in canonical_state(unwrap(model), groups).items():
        is_norm = "norm" in name and name.endswith("weight")
        values = torch.randn(weight.shape, generator=generator)
        fan_in = weight[0].numel() if weight.dim() > 1 else 100
        weights[name] = (1 + 0.1 * values if is_norm else values * fan_in**-0.5).bfloat16().float()
    return weights


def reference_model(config: MM1Config, weights: Mapping[str, Tensor], groups: ProcessGroupCollection) -> MM1Model:
    """The local backend's model in float64 and without FP8."""
    plain = with_precision(dataclasses.replace(config, fp8=Fp8Config()), "fp32")
    model = unwrap(build_module(plain, backend="local", pg_collection=groups))
    load_canonical(model, weights, groups)
    return in_float64(model).train()


def in_float64(model: torch.nn.Module) -> Any:
    """`model` itself, its router's product too, which is in float32 by configuration."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "moe_router_dtype"):
            config.moe_router_dtype = "fp64"
    return model.double()


def trained_model(
    config: MM1Config, weights: Mapping[str, Tensor], groups: ProcessGroupCollection, *, backend: str
) -> Any:
    """The model as training wraps it, in the configured precision: gradients are added up in `main_grad`."""
    [chunk] = build_model(config, backend=backend, pg_collection=groups)
    load_canonical(unwrap(chunk), weights, groups)
    return chunk.train()
