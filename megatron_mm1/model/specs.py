"""Which modules a decoder layer is made of, per backend, as megatron-core specs.

Both backends save their weights under the same names (Transformer Engine's, where a norm is part of the linear layer
that follows it), so a checkpoint written with one loads with the other.
"""

import dataclasses
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MlpBuilder,
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_mm1.model.attention import LocalAttention
from megatron_mm1.model.norms import LocalNorm
from megatron_mm1.model.router import Router


class LocalHybridStack(HybridStack):
    """HybridStack whose final norm is ours: megatron-core hard-wires Transformer Engine's."""

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        post_layer_norm: bool = True,
        post_process: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, *args, post_layer_norm=False, post_process=post_process, **kwargs)
        self.post_layer_norm = post_layer_norm
        if post_process and post_layer_norm:
            self.final_norm = LocalNorm(config, config.hidden_size, config.layernorm_epsilon)


def decoder_stack_spec(backend: str, *, qk_layernorm: bool) -> ModuleSpec:
    """The decoder's stack: one layer spec per symbol of the layer pattern (`*` attention, `-` dense FFN, `E` experts).

    Args:
        backend: "transformer_engine" or "local".
        qk_layernorm: normalise queries and keys per head.
    """
    return _transformer_engine_stack(qk_layernorm) if backend == "transformer_engine" else _local_stack(qk_layernorm)


def _attention_spec(submodules: SelfAttentionSubmodules, mask: AttnMaskType) -> ModuleSpec:
    return ModuleSpec(module=SelfAttention, params={"attn_mask_type": mask}, submodules=submodules)


def _experts_spec(*, use_te: bool) -> MlpBuilder:
    """megatron-core's experts with our router; their number comes from the configuration."""
    experts = get_moe_module_spec(use_te=use_te, num_experts=1, moe_grouped_gemm=use_te)
    submodules = experts.keywords["submodules"]
    return partial(MoELayer, submodules=dataclasses.replace(submodules, router=Router))


def _local_stack(qk_layernorm: bool) -> ModuleSpec:
    qk_norm = LocalNorm if qk_layernorm else None
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=LocalAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=LocalHybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=LocalNorm,
                    # The mask given at run time says everything.
                    self_attention=_attention_spec(attention, AttnMaskType.arbitrary),
                    self_attn_bda=get_bias_dropout_add,
                    sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=LocalNorm,
                    mlp=partial(MLP.as_mlp_submodule, submodules=mlp),
                    mlp_bda=get_bias_dropout_add,
                    sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
                ),
            ),
            moe_layer=ModuleSpec(
                module=MoETransformerLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=LocalNorm,
                    mlp=_experts_spec(use_te=False),
                    mlp_bda=get_bias_dropout_add,
                ),
            ),
        ),
    )


def _transformer_engine_stack(qk_layernorm: bool) -> ModuleSpec:
    from megatron.core.extensions.transformer_engine import (
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    qk_norm = TENorm if qk_layernorm else None
    attention = SelfAttentionSubmodules(
        linear_qkv=TELayerNormColumnParallelLinear,
        core_attention=TEDotProductAttention,
        linear_proj=TERowParallelLinear,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    mlp = MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear)
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    self_attention=_attention_spec(attention, AttnMaskType.padding_causal),
                    self_attn_bda=get_bias_dropout_add,
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    mlp=partial(MLP.as_mlp_submodule, submodules=mlp),
                    mlp_bda=get_bias_dropout_add,
                ),
            ),
            moe_layer=ModuleSpec(
                module=MoETransformerLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=TENorm,
                    mlp=_experts_spec(use_te=True),
                    mlp_bda=get_bias_dropout_add,
                ),
            ),
        ),
    )
