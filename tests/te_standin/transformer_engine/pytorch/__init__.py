"""What megatron-core and megatron_mm1 take from transformer_engine.pytorch."""

from transformer_engine.pytorch import distributed, optimizers
from transformer_engine.pytorch.attention import DotProductAttention
from transformer_engine.pytorch.module import (
    Fp8Padding,
    Fp8Unpadding,
    GroupedLinear,
    LayerNorm,
    LayerNormLinear,
    Linear,
    RMSNorm,
)
from transformer_engine.pytorch.quantization import autocast, fp8_autocast, fp8_model_init, quantized_model_init

__all__ = [
    "DotProductAttention",
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "autocast",
    "distributed",
    "fp8_autocast",
    "fp8_model_init",
    "optimizers",
    "quantized_model_init",
]
